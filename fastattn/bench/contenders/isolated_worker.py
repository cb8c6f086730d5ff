"""The other side of isolated.py: one contender, built and run as in the process that measures.

    python remote_child.py isolated_worker.py MODELS KEY PRECISION DEVICE KIND THREADS

MODELS is what `torch.save` made of a `source.Models`, by the process that started this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from fastattn.bench.contenders import BUILDERS, Runner, Source, Stages
from fastattn.bench.contenders.remote_runner import GRADIENT
from fastattn.bench.parity import floating_tensors


class _Later(Mapping[str, Any]):
    """Arrays by name, made when they are fetched: not while the call is timed."""

    def __init__(self, make: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._make = make

    def _arrays(self) -> dict[str, Any]:
        # numpy has no bfloat16.
        return {
            name: (each.float() if each.is_floating_point() else each).detach().cpu().numpy()
            for name, each in self._make().items()
        }

    def __getitem__(self, name: str) -> Any:
        return self._arrays()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays())

    def __len__(self) -> int:
        return len(self._arrays())

    def items(self) -> Any:
        return self._arrays().items()


def prepare(child: Any) -> Any:
    """Build the contender and return what makes a workload's call."""
    pickled, key, precision, device, kind, threads = child.arguments
    torch.set_num_threads(int(threads))
    # Written by the process that started this one, of classes that it could import.
    models = torch.load(pickled, weights_only=False)
    stages = Stages()
    source = Source(models, torch.device(device), kind)
    try:
        runner = BUILDERS[key].build(source, precision, stages)
    finally:
        child.stages_ms.update(stages.times_ms)

    def task(request: Mapping[str, Any], arrays: Mapping[str, Any]) -> Callable[[], Any]:
        inputs = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        return _TASKS[request["do"]](runner, request, inputs)

    return task


def _forward(
    runner: Runner, request: Mapping[str, Any], inputs: dict[str, torch.Tensor]
) -> Callable[[], Any]:
    def run() -> Any:
        output = runner.forward(inputs)
        return _Later(lambda: floating_tensors(output))

    return run


def _generate(
    runner: Runner, request: Mapping[str, Any], inputs: dict[str, torch.Tensor]
) -> Callable[[], Any]:
    def run() -> Any:
        output = runner.generate(inputs, request["new_tokens"])
        return _Later(lambda: {"tokens": output.tokens}), {"stamps_ms": output.stamps_ms}

    return run


def _logits(runner: Runner, request: Mapping[str, Any], inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    tokens = inputs.pop("tokens")

    def run() -> Any:
        logits = runner.logits(inputs, tokens)
        return _Later(lambda: {"logits": logits})

    return run


def _train(runner: Runner, request: Mapping[str, Any], inputs: dict[str, torch.Tensor]) -> Callable[[], Any]:
    def run() -> Any:
        step = runner.train_step(inputs)
        gradients = {f"{GRADIENT}{name}": each for name, each in step.gradients.items()}
        parts = {"forward_ms": [step.forward_ms], "backward_ms": [step.backward_ms]}
        return _Later(lambda: {"loss": step.loss, **gradients}), parts

    return run


_TASKS = {"forward": _forward, "generate": _generate, "logits": _logits, "train": _train}
