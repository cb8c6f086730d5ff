"""What the demonstration times: one model run in several ways over the same batches of real sentences."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastattn.bench.contenders import (
    BUILDERS,
    DTYPES,
    UNTOUCHED,
    Models,
    Runner,
    Source,
    Stages,
    auto_dtypes,
    label,
)
from fastattn.bench.contenders.torch_models import TorchRunner, require_cpp_compiler
from fastattn.bench.parity import FP32_TOLERANCE, Parity, compare, precision_tolerance
from fastattn.bench.rows import Row
from fastattn.bench.timing import Contender, measure

__all__ = ["FASTATTN", "PADDED", "Timing", "time_contenders"]

FASTATTN = label("fastattn", "fp32")
# The swapped model made to compute the padding too: tells what of the ratio is padding left out.
PADDED = label("fastattn-padded", "fp32")

Batch = Mapping[str, torch.Tensor]
Forward = Callable[[Batch], Any]

_MIN_ROUNDS = 7
_WARMUP = 2
# What one call of every contender takes together, in calls of the eager model: all others are faster than it.
_ROUND_COST = 6.0


@dataclass
class Timing:
    """What was measured, and the ways of running the model that were prepared for it.

    Attributes:
        rows: one a contender.
        timed: how many batches one call runs over, counted from the first.
        forwards: contender name to the function that runs one batch.
        resources: holds the exported model's folder; closed when `forwards` is no longer called.
    """

    rows: list[Row] = field(default_factory=list)
    timed: int = 0
    forwards: dict[str, Forward] = field(default_factory=dict)
    resources: ExitStack = field(default_factory=ExitStack)


def time_contenders(
    models: Models,
    batches: Sequence[Batch],
    *,
    device: str,
    budget_s: float,
    progress: bool = False,
) -> Timing:
    """Time the untouched, the swapped and the exported model, interleaved, over as many batches as fit.

    Args:
        models: the swapped model, and the untouched one.
        batches: tokenized batches on `device`.
        device: "cpu" or "cuda".
        budget_s: seconds for timing, warm-up included; compiling and exporting come on top, and every
            contender gets seven rounds over one batch at the least.
        progress: show a bar on stderr.
    """
    source = Source(models, torch.device(device), "encoder")
    result = Timing(resources=source.resources)
    reference = _built(source, "eager", "fp32").forward
    result.timed = _batches_that_fit(reference, batches, budget_s)
    timed = batches[: result.timed]
    result.rows = measure(
        _contenders(source, timed, result.forwards),
        check=_Check(source, reference, timed),
        baseline=[label(key, "fp32") for key in UNTOUCHED],
        device=device,
        budget_s=budget_s * _MIN_ROUNDS / (_MIN_ROUNDS + _WARMUP),
        min_rounds=_MIN_ROUNDS,
        warmup=_WARMUP,
        progress=progress,
        label="timing",
    )
    return result


def _built(source: Source, key: str, dtype: str) -> Runner:
    return BUILDERS[key].build(source, dtype, Stages())


def _contenders(source: Source, batches: Sequence[Batch], forwards: dict[str, Forward]) -> list[Contender]:
    def contender(key: str, dtype: str) -> Contender:
        name = label(key, dtype)

        def prepare() -> Callable[[], list[Any]]:
            runner = _compiled(source, dtype) if key == "compile" else _built(source, key, dtype)
            forward = forwards[name] = runner.forward
            return lambda: [forward(batch) for batch in batches]

        # The untouched model in the same precision tells what of a ratio is the precision's.
        against = label("sdpa", dtype) if dtype != "fp32" else None
        # The swapped model made to compute the padding is no way to run it, but tells what padding costs.
        ours = BUILDERS[key].ours and key != "fastattn-padded"
        return Contender(name, prepare=prepare, dtype=dtype, against=against, highlight=ours)

    keys = ("eager", "sdpa", "compile", "fastattn-padded", "fastattn", "onnx")
    lower = [
        contender(key, dtype) for dtype in auto_dtypes(source.device)[1:] for key in ("sdpa", "fastattn")
    ]
    return [contender(key, "fp32") for key in keys] + lower


def _compiled(source: Source, dtype: str) -> Runner:
    """torch.compile as one uses it on text: one graph for all lengths, not one graph (and wait) a length."""
    if source.device.type == "cpu":
        require_cpp_compiler()
    model: Any = source.untouched().to(source.device, DTYPES[dtype])
    model.set_attn_implementation("sdpa")
    return TorchRunner(model, source.kind, partial(torch.compile, dynamic=True))


def _batches_that_fit(reference: Forward, batches: Sequence[Batch], budget_s: float) -> int:
    """How many batches a call may run over so that warm-up and the fewest rounds fit into the budget."""

    def seconds() -> float:
        start = time.perf_counter()
        # Copying a number to the host waits for the device.
        reference(batches[0]).last_hidden_state.sum().item()
        return time.perf_counter() - start

    typical = statistics.median(seconds() for _ in range(3))
    return max(1, min(len(batches), int(budget_s / ((_MIN_ROUNDS + _WARMUP) * _ROUND_COST * typical))))


class _Check:
    """Parity over all timed batches; a lower precision is held to what the untouched model loses in it."""

    def __init__(self, source: Source, reference: Forward, batches: Sequence[Batch]) -> None:
        self._source = source
        self._batches = batches
        self._expected = [reference(batch) for batch in batches]
        self._limits: dict[str, float] = {}

    def __call__(self, contender: Contender, outputs: list[Any]) -> Parity:
        if contender.dtype == "fp32":
            return self._worst(outputs, tolerance=FP32_TOLERANCE)
        return self._worst(outputs, tolerance=self._limit(contender.dtype), kind="precision")

    def _limit(self, dtype: str) -> float:
        if dtype not in self._limits:
            untouched = _built(self._source, "sdpa", dtype)
            loss = self._worst([untouched.forward(batch) for batch in self._batches], kind="precision")
            self._limits[dtype] = precision_tolerance(loss, torch.finfo(DTYPES[dtype]).eps)
        return self._limits[dtype]

    def _worst(self, outputs: list[Any], **gate: Any) -> Parity:
        worst: Parity | None = None
        for batch, expected, output in zip(self._batches, self._expected, outputs, strict=True):
            figure = compare(expected, output, mask=batch["attention_mask"], **gate)
            # Not ">": a NaN is worse than any number and stays.
            if worst is None or not figure.relative_error <= worst.relative_error:
                worst = figure
        assert worst is not None
        return worst
