"""optimum's ORTModel, on optimum's own export: in a Python environment of its own, for optimum-onnx pins an
older transformers than fastattn takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.contenders.quiet import quiet
from fastattn.bench.contenders.requirements import require_cpu
from fastattn.bench.contenders.runner import Generated, Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.remote import CHILD, RemoteOutput, RemoteProcess, RemoteRun
from fastattn.bench.timers import Sample
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
    return OptimumModel(child)


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


class OptimumModel(Runner):
    """An ORTModel in the other environment."""

    def __init__(self, child: RemoteProcess) -> None:
        self._child = child

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.forward_call(inputs)()

    def forward_call(self, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        return _Call(self._run({"do": "forward"}, inputs), _Outputs)

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        output: Generated = self.generate_call(inputs, new_tokens)()
        return Generated(output.tokens, output.stamps_ms)

    def generate_call(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Callable[[], Any]:
        return _Call(self._run({"do": "generate", "new_tokens": new_tokens}, inputs), _Tokens)

    def _run(self, request: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> RemoteRun:
        return self._child.run(request, {name: tensor.numpy() for name, tensor in inputs.items()})


class _Call:
    """A workload in the other environment, which times itself (`timers.SelfTimed`)."""

    def __init__(self, run: RemoteRun, kind: Callable[[RemoteOutput], Any]) -> None:
        self._run, self._kind = run, kind

    @property
    def peak_host_bytes(self) -> int | None:
        return self._run.peak_host_bytes

    def sample(self, calls: int) -> Sample:
        sample = self._run.sample(calls)
        return sample._replace(output=self._kind(sample.output))

    def __call__(self) -> Any:
        return self.sample(1).output


class _Outputs(Mapping[str, torch.Tensor]):
    """A forward's outputs by name, fetched when they are looked at: not while it is timed."""

    def __init__(self, output: RemoteOutput) -> None:
        self._output = output

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._output.arrays().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Tokens:
    """What `Generated` is, its tokens fetched when they are looked at."""

    def __init__(self, output: RemoteOutput) -> None:
        self._outputs = _Outputs(output)
        self.stamps_ms = tuple(output.parts["stamps_ms"])

    @property
    def tokens(self) -> torch.Tensor:
        return self._outputs["tokens"]
