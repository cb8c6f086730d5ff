"""`fastattn.benchmark`: a model measured against itself before the swap."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from fastattn.bench.contenders import (
    AUTO,
    BUILDERS,
    DTYPES,
    OURS,
    UNTOUCHED,
    Forward,
    Source,
    auto_dtypes,
    copy_of,
    label,
)
from fastattn.bench.environment import capture_environment
from fastattn.bench.parity import FP32_TOLERANCE, Parity, compare, precision_tolerance
from fastattn.bench.result import BenchmarkResult, Measurement
from fastattn.bench.timing import Contender, MissingError, measure
from fastattn.bench.workloads import Workload, auto_workloads, maximum_positions
from fastattn.swap import is_swapped, optimize, restore

__all__ = ["benchmark", "check_choices"]


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
    progress: bool = False,
) -> BenchmarkResult:
    """Time a model that takes `input_ids` against itself before the swap, parity beside every time.

    Contenders are copies: `model` comes back as it was, swapped or not. They run interleaved in one process
    under `torch.inference_mode`. Per workload, ratios are over the faster of the untouched eager and SDPA
    models; a row in a lower precision has a second ratio, over the untouched SDPA model in that precision.

    Args:
        model: measured swapped: as it is if it has been optimized, else an optimized copy.
        reference: the untouched model, for the timings and for parity; None takes `model` itself, restored.
        device: "cpu", "cuda", or "auto" for cuda where there is one.
        contenders: names out of "eager", "sdpa", "compile" (torch.compile of the SDPA model), "fastattn",
            "onnx" (the exported swapped model), "transformers-onnx" (transformers' OnnxExporter with
            ort_fusions="cpu"); "auto" is all but the last, with compile in the first dtype only. eager and
            SDPA are always measured; eager and the exports run in the first dtype.
        workloads: what to run; "auto" is batch 8 x 128 at 47% and at 100% fill, and batch 1 x 128.
        dtypes: names out of "fp32", "bf16", "fp16"; None is fp32, and bf16 where the device computes it
            faster.
        budget_s: seconds of timing, over all workloads; copying, compiling and exporting come on top, and
            every workload gets `min_rounds` rounds.
        min_rounds: the fewest rounds a ratio rests on.
        progress: show a bar on stderr where that is a terminal.

    Raises:
        ValueError: an argument is none of these, a workload is longer than the model's positions, or the
            model does not take input_ids alone.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> model = BertModel(BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1))
        >>> workload = Workload(batch=2, seq=8)
        >>> result = benchmark(model, workloads=workload, contenders="fastattn", dtypes="fp32", budget_s=1)
        >>> [row.name for row in result.measurements[0].rows]
        ['eager fp32', 'SDPA fp32', 'fastattn fp32']
    """
    _require_token_model(model)
    where, names, types = check_choices(device, contenders, dtypes)
    batches = _workloads(workloads, maximum_positions(model))
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s!r}; it must be more than 0 seconds")

    swapped = is_swapped(model)

    def untouched() -> torch.nn.Module:
        duplicate = copy_of(model if reference is None else reference)
        restore(duplicate)
        return duplicate.to(where, torch.float32)

    def fused() -> torch.nn.Module:
        return copy_of(model) if swapped else _optimized(copy_of(model))

    # Before anything runs: the load that is recorded is other people's.
    environment = capture_environment()
    limit = maximum_positions(model)
    sample = _inputs(model, Workload(2, min(16, limit or 16), 0.75), where)
    with ExitStack() as resources:
        forwards = _Forwards(Source(fused, untouched, sample, where, resources))
        planned = _plan(names, types, automatic=contenders == "auto")
        share_s = budget_s / len(batches)
        measurements = tuple(
            _measure(
                forwards, planned, workload, _inputs(model, workload, where), share_s, min_rounds, progress
            )
            for workload in batches
        )
    return BenchmarkResult(
        model=_description(model),
        measurements=measurements,
        environment=environment,
        settings={
            "device": where.type,
            "contenders": list(names),
            "dtypes": list(types),
            "budget_s": budget_s,
            "min_rounds": min_rounds,
            "model_was_swapped": swapped,
            "reference": "the model before the swap" if reference is None else "given",
        },
    )


class _Forwards:
    """Contenders built once for all workloads; one that cannot be built fails the same way each time."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._built: dict[tuple[str, str], Forward | Exception] = {}

    def get(self, key: str, dtype: str) -> Forward:
        if (key, dtype) not in self._built:
            try:
                self._built[key, dtype] = BUILDERS[key][1](self.source, dtype)
            except Exception as error:
                self._built[key, dtype] = error
        built = self._built[key, dtype]
        if isinstance(built, Exception):
            raise built
        return built


def _measure(
    forwards: _Forwards,
    planned: Sequence[tuple[str, str]],
    workload: Workload,
    inputs: dict[str, torch.Tensor],
    budget_s: float,
    min_rounds: int,
    progress: bool,
) -> Measurement:
    """One workload: the reference's output, then every contender interleaved."""
    expected, mask = forwards.source.reference(inputs), inputs["attention_mask"]
    limits: dict[str, float] = {}

    def limit(dtype: str) -> float:
        """The gate on precision loss, from what the untouched model loses on these very inputs."""
        if dtype not in limits:
            loss = compare(expected, forwards.get("sdpa", dtype)(inputs), mask=mask, kind="precision")
            limits[dtype] = precision_tolerance(loss, torch.finfo(DTYPES[dtype]).eps)
        return limits[dtype]

    def check(contender: Contender, output: Any) -> Parity:
        if contender.dtype == "fp32":
            return compare(expected, output, mask=mask, tolerance=FP32_TOLERANCE)
        return compare(expected, output, mask=mask, tolerance=limit(contender.dtype), kind="precision")

    def prepare(key: str, dtype: str) -> Callable[[], Any]:
        forward = forwards.get(key, dtype)
        return lambda: forward(inputs)

    first = planned[0][1]
    rows = measure(
        [
            Contender(
                label(key, dtype),
                prepare=partial(prepare, key, dtype),
                dtype=dtype,
                against=label("sdpa", dtype) if dtype != first else None,
                highlight=key in OURS,
            )
            for key, dtype in planned
        ],
        check=check,
        baseline=[label(key, dtype) for key, dtype in planned if key in UNTOUCHED and dtype == first],
        device=forwards.source.device.type,
        budget_s=budget_s,
        min_rounds=min_rounds,
        progress=progress,
        label=str(workload),
    )
    return Measurement(workload, tuple(rows))


def _plan(names: Sequence[str], dtypes: Sequence[str], *, automatic: bool) -> list[tuple[str, str]]:
    """Which contender runs in which dtype, in the order of the rows."""
    once = ("eager", "compile", "onnx") if automatic else ("eager", "onnx", "transformers-onnx")
    return [(key, dtype) for dtype in dtypes for key in names if dtype == dtypes[0] or key not in once]


def _optimized(model: torch.nn.Module) -> torch.nn.Module:
    report = optimize(model)
    if not report.swapped:
        reasons = sorted({site.reason for site in report.sites if site.reason})
        raise MissingError(f"layers to swap ({'; '.join(reasons)})")
    return model


def _inputs(model: torch.nn.Module, workload: Workload, device: torch.device) -> dict[str, torch.Tensor]:
    config: Any = model.config
    padding = getattr(config, "pad_token_id", None)
    inputs = workload.tokens(config.vocab_size, avoid=padding, device=str(device))
    takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
    if takes_types and getattr(config, "type_vocab_size", None):
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return inputs


def _require_token_model(model: torch.nn.Module) -> None:
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; it must be a torch.nn.Module")
    parameters = inspect.signature(model.forward).parameters
    takes_tokens = "input_ids" in parameters or any(
        each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()
    )
    config: Any = getattr(model, "config", None)
    if not takes_tokens or not isinstance(getattr(config, "vocab_size", None), int):
        raise ValueError(
            f"{type(model).__name__} cannot be given tokens: its forward must take input_ids and "
            "attention_mask, and its config name a vocab_size; time any other callable with "
            "fastattn.bench.measure"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder; encoders and decoders alone can be measured"
        )


def check_choices(
    device: str, contenders: str | Sequence[str], dtypes: str | Sequence[str] | None
) -> tuple[torch.device, tuple[str, ...], tuple[str, ...]]:
    """The device, contenders and dtypes that `benchmark` would use: all that needs no model to be checked.

    Raises:
        ValueError: one of them is not among the accepted values, which the message names.
    """
    where = _device(device)
    return where, _contenders(contenders), _dtypes(dtypes, where)


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; it must be one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            'device "cuda" was asked for and no CUDA or ROCm device is visible to torch; use "cpu"'
        )
    return torch.device(device)


def _names(values: str | Sequence[str], accepted: Sequence[str], what: str) -> tuple[str, ...]:
    chosen = [values] if isinstance(values, str) else list(values)
    if not chosen:
        raise ValueError(f"{what} is empty; name at least one of {', '.join(accepted)}")
    for value in chosen:
        if value not in accepted:
            raise ValueError(f"{what} names {value!r}; it must be out of {', '.join(accepted)}")
    return tuple(chosen)


def _contenders(contenders: str | Sequence[str]) -> tuple[str, ...]:
    chosen = AUTO if contenders == "auto" else _names(contenders, tuple(BUILDERS), "contenders")
    # A ratio needs its baseline, whoever is measured.
    return tuple(key for key in BUILDERS if key in chosen or key in UNTOUCHED)


def _dtypes(dtypes: str | Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    chosen = auto_dtypes(device) if dtypes is None else _names(dtypes, tuple(DTYPES), "dtypes")
    return tuple(name for name in DTYPES if name in chosen)


def _workloads(workloads: str | Workload | Sequence[Workload], limit: int | None) -> tuple[Workload, ...]:
    if isinstance(workloads, str):
        if workloads != "auto":
            raise ValueError(
                f'workloads is {workloads!r}; it must be "auto", a Workload or a sequence of them'
            )
        return auto_workloads(limit)
    chosen = (workloads,) if isinstance(workloads, Workload) else tuple(workloads)
    if not chosen or not all(isinstance(each, Workload) for each in chosen):
        raise ValueError(f'workloads is {workloads!r}; it must be "auto", a Workload or a sequence of them')
    for each in chosen:
        if limit is not None and each.seq > limit:
            raise ValueError(f"a workload has {each.seq} tokens a sequence; the model takes at most {limit}")
    return chosen


def _description(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    known = {name: getattr(config, name, None) for name in ("model_type", "num_hidden_layers", "hidden_size")}
    return {
        "name": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **{name: value for name, value in known.items() if value is not None},
    }
