"""Choosing the backend: per context, from the environment, refused with the reason where it cannot run."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import fastattn
from fastattn import backend
from fastattn.backend import backend_for, get_backend

CPU = torch.device("cpu")


def test_auto_is_pytorch_on_a_cpu():
    assert get_backend() == "auto" and backend_for(CPU) == "torch"


def test_with_statement_puts_the_previous_backend_back():
    with fastattn.set_backend("torch"):
        assert get_backend() == "torch"
    assert get_backend() == "auto"


def test_the_choice_is_per_thread():
    seen = []
    with fastattn.set_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(get_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="'auto', 'gluon', 'triton', 'torch'"):
        fastattn.set_backend("cuda")


@pytest.fixture
def environment(monkeypatch):
    """The environment read anew, in the test and after it."""
    backend._backend_of_environment.cache_clear()
    yield monkeypatch
    backend._backend_of_environment.cache_clear()


def test_the_environment_chooses_and_is_checked(environment):
    environment.setenv("FASTATTN_BACKEND", "torch")
    assert get_backend() == "torch"
    backend._backend_of_environment.cache_clear()
    environment.setenv("FASTATTN_BACKEND", "rocket")
    with pytest.raises(ValueError, match="FASTATTN_BACKEND is 'rocket'"):
        get_backend()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_triton_without_a_gpu_names_the_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(fastattn.BackendError, match="no CUDA or ROCm device"):
        fastattn.set_backend("triton")
    with pytest.raises(fastattn.BackendError, match="Gluon"):
        fastattn.set_backend("gluon")


def _python(code: str, **environment: str) -> str:
    import os

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    code = "import sys, fastattn; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert _python(code).split() == ["False", "False"]


def test_works_without_triton_onnx_and_transformers_and_names_what_is_missing():
    code = """
import importlib.abc, importlib.util, sys
MISSING = {"triton", "onnx", "onnxruntime", "onnxscript", "transformers", "fastattn_kernels"}
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in MISSING else real(name, *a)
import torch, fastattn
x = torch.randn(1, 2, 3, 16)
assert fastattn.ops.attention(x, x, x).shape == x.shape
report = fastattn.optimize(torch.nn.Linear(2, 2))
print(report.swapped, report.sites[0].reason)
try:
    fastattn.set_backend("triton")
except fastattn.BackendError as error:
    print(error)
try:
    fastattn.export(torch.nn.Linear(2, 2), "somewhere")
except ImportError as error:
    print(error)
from fastattn.cli import main
print(main(["inspect", "minilm"]))
"""
    output = _python(code)
    assert "no layer of a known family" in output
    assert "triton is not installed" in output
    assert "fastattn[onnx]" in output
    assert output.strip().endswith("2")
