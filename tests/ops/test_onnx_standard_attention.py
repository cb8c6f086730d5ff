"""The ONNX standard's own Attention cases through `fastattn.ops.attention`: PyTorch on the CPU, then the
kernels in Triton's interpreter.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

import fastattn.backend

pytest.importorskip("onnx")


from onnx_standard_attention import OUTPUTS, run_case, standard_cases

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
CASES = standard_cases()
# Triton's interpreter multiplies bfloat16 matrices wrongly: those cases need a GPU.
RUN = [case for case in CASES if not (INTERPRETING and case.dtype == torch.bfloat16)]


def test_the_standard_has_the_cases_we_know():
    """onnx 1.23. All of them run on the CPU; a newer onnx may bring more, and they must be mapped too."""
    assert len({case.name for case in CASES}) == len(CASES) == 93
    backend = fastattn.backend.backend_for(torch.device("cpu"))
    assert backend == ("triton" if INTERPRETING else "torch")
    assert len(RUN) == (88 if INTERPRETING else 93)


# The standard's runner allows bfloat16 two units in the last place. So do we float16, whose expected values
# were themselves rounded to float16 at every step: ours are nearer to float64, which is asserted.
TWO_UNITS = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@pytest.mark.parametrize("case", RUN, ids=lambda case: case.name)
def test_case_of_the_standard(case):
    rtol = max(case.rtol, TWO_UNITS.get(case.dtype, 0.0))
    found = run_case(case)
    expected = {name: x for name, x in case.outputs.items() if name != "qk_matmul_output"}
    assert "Y" in expected and found.keys() == expected.keys() <= set(OUTPUTS)
    for name, wanted in expected.items():
        assert found[name].dtype == wanted.dtype
        torch.testing.assert_close(
            found[name], wanted, rtol=rtol, atol=case.atol, msg=lambda m, name=name: f"{name}: {m}"
        )
    if case.dtype == torch.float16:
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in case.inputs.items()}
        with fastattn.set_backend("torch"):
            exact = run_case(replace(case, inputs=inputs))["Y"]
        assert (found["Y"] - exact).abs().max() <= (expected["Y"] - exact).abs().max()


@pytest.mark.skipif(INTERPRETING, reason="this very run is the one in the interpreter")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_the_cases_through_the_kernels_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTATTN_BACKEND": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    # 88 cases, and the count of them.
    assert "89 passed, 1 skipped" in result.stdout, result.stdout
