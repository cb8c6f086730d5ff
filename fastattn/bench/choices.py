"""What may be asked of a benchmark: devices, contenders, dtypes, workloads; checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from fastattn.bench.contenders import AUTO, BUILDERS, DTYPES, UNTOUCHED, Kind, auto_dtypes
from fastattn.bench.workloads import Workload, auto_workloads

__all__ = ["check_choices", "check_model", "choose_workloads", "planned"]

ALL, AUTOMATIC = "all", "auto"
# What every kind of model can be asked to do.
_TASKS: dict[Kind, tuple[str, ...]] = {
    "encoder": ("encode", "train"),
    "classifier": ("classify", "train"),
    "decoder": ("prefill", "decode", "train"),
    "encoder-decoder": ("encode", "decode", "train"),
}


def check_choices(
    device: str, contenders: str | Sequence[str], dtypes: str | Sequence[str] | None
) -> tuple[torch.device, tuple[str, ...], tuple[str, ...]]:
    """The device, contenders and dtypes that `benchmark` would use: all that needs no model to be checked.

    Raises:
        ValueError: one of them is not among the accepted values, which the message names.
    """
    where = _device(device)
    return where, _contenders(contenders, where), _dtypes(dtypes, where)


def check_model(model: Any) -> None:
    """Refuse what cannot be given tokens.

    Raises:
        ValueError: `model` is no module, or its forward takes no input_ids, or its config has no vocab_size.
    """
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


def choose_workloads(
    workloads: str | Workload | Sequence[Workload], kind: Kind, limit: int | None
) -> tuple[Workload, ...]:
    """The workloads asked for, or those of "auto".

    Raises:
        ValueError: they are none, too long for the model, or ask what this kind of model does not do.
    """
    if isinstance(workloads, str):
        if workloads != AUTOMATIC:
            raise ValueError(
                f'workloads is {workloads!r}; it must be "auto", a Workload or a sequence of them'
            )
        return auto_workloads(kind, limit)
    chosen = (workloads,) if isinstance(workloads, Workload) else tuple(workloads)
    if not chosen or not all(isinstance(each, Workload) for each in chosen):
        raise ValueError(f'workloads is {workloads!r}; it must be "auto", a Workload or a sequence of them')
    for each in chosen:
        length = each.seq + (each.new_tokens if kind == "decoder" else 0)
        if limit is not None and length > limit:
            raise ValueError(f"a workload has {length} tokens a sequence; the model takes at most {limit}")
        if each.task not in _TASKS[kind]:
            raise ValueError(
                f"a workload's task is {each.task!r}; of this model, one of kind {kind!r}, can be asked: "
                f"{', '.join(_TASKS[kind])}"
            )
    return chosen


def planned(
    names: Sequence[str], dtypes: Sequence[str], workload: Workload, kind: Kind, *, automatic: bool
) -> list[tuple[str, str]]:
    """Which contender runs in which precision, in the order of the rows.

    The untouched eager model and torch.compile run in the first dtype alone. Where contenders were chosen for
    the caller, what cannot do the workload at all is left out; where they were named it is a row that says
    so.
    """
    pairs: list[tuple[str, str]] = []
    later: list[tuple[str, str]] = []
    once = ("eager", "compile", "compile-reduce-overhead")
    for key in names:
        builder = BUILDERS[key]
        if automatic and (workload.task not in builder.tasks or kind not in builder.kinds):
            continue
        if builder.precisions:
            pairs += [(key, precision) for precision in builder.precisions]
            continue
        for dtype in dtypes[:1] if key in once else dtypes:
            (pairs if dtype == dtypes[0] else later).append((key, dtype))
    return pairs + sorted(later, key=lambda pair: dtypes.index(pair[1]))


def _device(device: str) -> torch.device:
    if device == AUTOMATIC:
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


def _contenders(contenders: str | Sequence[str], device: torch.device) -> tuple[str, ...]:
    if contenders == ALL:
        return tuple(BUILDERS)
    chosen = (
        AUTO[device.type] if contenders == AUTOMATIC else _names(contenders, tuple(BUILDERS), "contenders")
    )
    # A ratio needs its baseline, whoever is measured.
    return tuple(key for key in BUILDERS if key in chosen or key in UNTOUCHED)


def _dtypes(dtypes: str | Sequence[str] | None, device: torch.device) -> tuple[str, ...]:
    chosen = auto_dtypes(device) if dtypes is None else _names(dtypes, tuple(DTYPES), "dtypes")
    return tuple(name for name in DTYPES if name in chosen)
