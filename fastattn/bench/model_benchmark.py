"""`fastattn.benchmark`: a model measured against itself before the swap, and against other ways to run it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from fastattn.bench.choices import check_choices, check_model, choose_workloads
from fastattn.bench.contenders import Models, Source, kind_of
from fastattn.bench.environment import capture_environment
from fastattn.bench.load import LoadMeter
from fastattn.bench.process import frozen_heap
from fastattn.bench.result import BenchmarkResult, Measurement
from fastattn.bench.roofline import Roofline
from fastattn.bench.scaling import Scaling
from fastattn.bench.session import FORWARD_TASKS, SCALING_AXES, Session
from fastattn.bench.timing import Interrupted
from fastattn.bench.workloads import Workload, maximum_positions
from fastattn.swap import is_swapped

__all__ = ["benchmark"]


def benchmark(
    model: torch.nn.Module,
    *,
    reference: torch.nn.Module | None = None,
    device: str = "auto",
    contenders: str | Sequence[str] = "auto",
    workloads: str | Workload | Sequence[Workload] = "auto",
    dtypes: str | Sequence[str] | None = None,
    budget_s: float = 60.0,
    min_rounds: int = 7,
    until: float | None = 0.02,
    with_roofline: bool = False,
    scaling_axes: Sequence[str] = (),
    isolate: bool = False,
    progress: bool = False,
    on_measurement: Callable[[Measurement], None] | None = None,
) -> BenchmarkResult:
    """Time a model that takes `input_ids` against itself before the swap and against other ways to run it,
    parity beside every time.

    Contenders are copies: `model` comes back as it was, swapped or not. They run interleaved in one process.
    Per workload, ratios are over the faster of the untouched eager and SDPA models; a row in a lower
    precision has a second ratio, over the untouched SDPA model in that precision. A contender that is not
    installed, crashes, runs out of memory or answers wrongly is a row with the reason. Ctrl-C ends the
    measuring and keeps what there is: the result's `interrupted` is then true.

    Args:
        model: measured swapped: as it is if it has been optimized, else an optimized copy.
        reference: the untouched model, for the timings and for parity; None takes `model` itself, restored.
        device: "cpu", "cuda", or "auto" for cuda where there is one.
        contenders: "auto", "all" or names out of `fastattn.bench.contenders.BUILDERS`. "auto" leaves the
            engines of others out, and torch.compile in all but the first dtype; "all" names those that are
            not installed as missing. eager and SDPA are always measured.
        workloads: what to run; "auto" is what the kind of model is used for: batches to encode or classify, a
            prompt and tokens after it.
        dtypes: names out of "fp32", "bf16", "fp16"; None is fp32, and bf16 where the device computes it
            faster. Contenders in int8 and the like have precisions of their own.
        budget_s: seconds of timing, over all workloads; copying, compiling and exporting come on top, and
            every workload gets `min_rounds` rounds.
        min_rounds: the fewest rounds a ratio rests on.
        until: rounds stop early where every ratio's 95% interval is within this part of its value; None uses
            the whole budget.
        with_roofline: count the operations of the untouched and the swapped model and set them against
            ceilings measured here, on the first encode, classify or prefill workload.
        scaling_axes: out of "length", "batch", "fill": measure the first workload along them.
        isolate: build and run every contender in a process of its own, so that one that crashes (a fault in
            an engine's machine code, not an exception) is a row, too. They still take turns. The model must
            be one that `torch.save` takes; memory then counts what a process of its own imports.
        progress: show a bar on stderr where that is a terminal.
        on_measurement: called with each workload's measurement when it is there.

    Raises:
        ValueError: an argument is none of these, a workload is longer than the model's positions or asks what
            the model does not do, or the model does not take input_ids.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1))
        >>> workload = Workload(batch=2, seq=8)
        >>> result = benchmark(model, workloads=workload, contenders="fastattn", dtypes="fp32", budget_s=1)
        >>> [row.name for row in result.measurements[0].rows]
        ['eager fp32', 'SDPA fp32', 'fastattn fp32']
    """
    check_model(model)
    where, names, types = check_choices(device, contenders, dtypes)
    kind, limit = kind_of(model), maximum_positions(model)
    batches = choose_workloads(workloads, kind, limit)
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s!r}; it must be more than 0 seconds")
    if until is not None and not 0 < until < 1:
        raise ValueError(
            f"until is {until!r}; it must be a fraction above 0 and below 1, such as 0.02, or None"
        )
    for axis in scaling_axes:
        if axis not in SCALING_AXES:
            raise ValueError(f"scaling_axes names {axis!r}; it must be out of {', '.join(SCALING_AXES)}")

    # Before anything runs: the load that is recorded is other people's.
    environment, load = capture_environment(), LoadMeter()
    swapped = is_swapped(model)
    settings = {
        "device": where.type,
        "kind": kind,
        "contenders": list(names),
        "dtypes": list(types),
        "budget_s": budget_s,
        "min_rounds": min_rounds,
        "until": until,
        "isolate": isolate,
        "model_was_swapped": swapped,
        "reference": "the model before the swap" if reference is None else "given",
    }

    measurements: list[Measurement] = []
    rooflines: list[Roofline] = []
    scalings: list[Scaling] = []
    interrupted = False
    with frozen_heap(), ExitStack() as resources:
        source = Source(Models(model, reference), where, kind, resources)
        session = Session(source, names, types, contenders == "auto", min_rounds, until, progress, isolate)
        try:
            for workload in batches:
                measurements.append(session.measure(workload, budget_s / len(batches)))
                if on_measurement is not None:
                    on_measurement(measurements[-1])
            if with_roofline:
                first = next((each for each in batches if each.task in FORWARD_TASKS), None)
                rooflines += session.rooflines(first) if first is not None else []
            for axis in scaling_axes:
                scalings.append(session.scaling(axis, batches[0], limit))
        except Interrupted as stopped:
            measurements.append(Measurement(batches[len(measurements)], stopped.rows))
            interrupted = True
        except KeyboardInterrupt:
            interrupted = True
    return BenchmarkResult(
        model=_description(model),
        measurements=tuple(measurements),
        environment=environment | {"load": load.read()},
        settings=settings,
        rooflines=tuple(rooflines),
        scalings=tuple(scalings),
        interrupted=interrupted,
    )


def _description(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    known = {name: getattr(config, name, None) for name in ("model_type", "num_hidden_layers", "hidden_size")}
    return {
        "name": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: value for name, value in known.items() if value is not None},
    }
