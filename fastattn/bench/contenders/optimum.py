"""optimum's ORTModel, on optimum's own export: in a Python environment of its own, for optimum-onnx pins an
older transformers than fastattn takes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.contenders.quiet import quiet
from fastattn.bench.contenders.remote_runner import RemoteRunner
from fastattn.bench.contenders.requirements import require_cpu
from fastattn.bench.contenders.runner import Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.remote import CHILD, RemoteProcess
from fastattn.bench.timing import MissingError

__all__ = ["build"]

PYTHON = "FASTATTN_OPTIMUM_PYTHON"
"""The environment variable that names the Python of that environment."""

_WORKER = Path(__file__).with_name("optimum_worker.py")
_CHECKOUT = Path(__file__).parents[3]


def build(source: Source, precision: str, stages: Stages) -> Runner:
    """optimum's `main_export`, with optimization O2 where it has one for the model, and its ORTModel.

    Raises:
        MissingError: there is no such environment, the benchmark does not run on the CPU, or optimum has no
            class for the model's head.
    """
    python = _python()
    require_cpu(source, "optimum's ORTModel")
    with stages("save"), quiet():
        saved = _for_transformers_4(source)
    exported = source.folder / "optimum-export"
    exported.mkdir()
    command = [python, CHILD, _WORKER, saved, exported, source.kind, str(torch.get_num_threads())]
    child = source.resources.enter_context(RemoteProcess(command, source.folder))
    for name, milliseconds in child.stages_ms.items():
        stages.times_ms[name] = milliseconds
    stages.versions.update(child.versions)
    return RemoteRunner(child)


def _python() -> Path:
    given = os.environ.get(PYTHON)
    python = Path(given) if given else _CHECKOUT / ".venv-optimum" / "bin" / "python"
    if not python.is_file():
        if given:
            raise MissingError(
                f"{given}, which {PYTHON} names: the Python of an environment with optimum-onnx"
            )
        way = (
            "make .venv-optimum/.installed"
            if (_CHECKOUT / "Makefile").is_file()
            else f"pip install optimum-onnx[onnxruntime] into one, and name its Python in {PYTHON}"
        )
        raise MissingError(f"optimum-onnx in an environment of its own: {way}")
    return python


def _for_transformers_4(source: Source) -> Path:
    """The saved model with a config that transformers 4 reads as 5 does; the weights are the same files."""
    folder = source.folder / "optimum-source"
    folder.mkdir()
    for file in source.saved.glob("*.safetensors*"):
        os.symlink(file, folder / file.name)
    config: dict[str, Any] = json.loads((source.saved / "config.json").read_text(encoding="utf-8"))
    # 5 holds in one entry what 4 reads from two, and would not miss.
    rotary = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rotary:
        config["rope_theta"] = rotary.pop("rope_theta")
        config["rope_scaling"] = None if rotary.get("rope_type") == "default" else rotary
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
