"""The outputs of every layer of both models, recorded by hooks and compared in the order layers finish."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.verification.comparison import is_finite_where, relative_error
from fastattn.verification.subject import Replay, Subject

__all__ = ["layer_errors", "watched"]


@dataclass
class _Recording:
    """What each layer gave, call by call, in the order layers finished."""

    outputs: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    order: list[tuple[str, int]] = field(default_factory=list)

    def output_hook(self, name: str) -> Callable[..., None]:
        return lambda module, args, output: self._record(name, output)

    def input_hook(self, name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: self._record(name, (*args, *kwargs.values()))

    def _record(self, name: str, value: Any) -> None:
        tensor = _main_tensor(value)
        if tensor is not None and tensor.is_nested:
            # What torch.nn's encoder hands its layers where a batch is padded.
            tensor = torch.nested.to_padded_tensor(tensor, 0.0)
        if tensor is not None:
            self.order.append((name, len(self.outputs[name])))
            # A copy: a fused layer may go on working in place.
            self.outputs[name].append(tensor.detach().clone())


def layer_errors(
    replay: Replay, subject: Subject, closed: tuple[str, ...], inputs_of: str | None = None
) -> Iterator[tuple[str, float]]:
    """The error of every layer's output, in the order layers finish; with `inputs_of`, of one layer's inputs.

    Layers inside the `closed` ones carry no hook: a fused layer whose parts are watched runs them unfused.
    """
    shared = _open_names(subject.model, closed) & _open_names(subject.reference, closed)
    recordings = []
    for which, run in ((subject.reference, replay.reference), (subject.model, replay.model)):
        with torch.no_grad(), replay.environment(which), _recorded(which, shared, inputs_of) as recording:
            torch.manual_seed(0)
            try:
                run(which)
            except Exception:
                return
        recordings.append(recording)
    expected, found = recordings
    for name, index in found.order:
        wanted = expected.outputs.get(name, [])
        if len(wanted) != len(found.outputs[name]) or wanted[index].shape != found.outputs[name][index].shape:
            continue
        error = _error(found.outputs[name][index], wanted[index], replay.masks)
        if error is not None:
            yield name, error


@contextmanager
def watched(model: nn.Module, closed: tuple[str, ...]) -> Iterator[None]:
    """Hooks that do nothing, where `layer_errors` has its own: the layers run as they do when recorded."""
    names = _open_names(model, closed)
    handles = [
        module.register_forward_hook(_watch) for name, module in model.named_modules() if name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(*_: Any) -> None:
    return None


@contextmanager
def _recorded(model: nn.Module, names: set[str], inputs_of: str | None) -> Iterator[_Recording]:
    recording = _Recording()
    handles = []
    for name, module in model.named_modules():
        if name == inputs_of:
            hook = recording.input_hook(name)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        elif name in names:
            watch = recording.output_hook(name) if inputs_of is None else _watch
            handles.append(module.register_forward_hook(watch))
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _open_names(model: nn.Module, closed: tuple[str, ...]) -> set[str]:
    names = (name for name, _ in model.named_modules())
    return {name for name in names if not any(name.startswith(f"{outer}.") for outer in closed)}


def _main_tensor(output: Any) -> Tensor | None:
    """The first floating-point tensor of a layer's output."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output if isinstance(output, (tuple, list)) else ()
    if hasattr(output, "values"):
        values = tuple(output.values())
    return next((x for x in values if isinstance(x, Tensor) and x.is_floating_point()), None)


def _error(found: Tensor, expected: Tensor, masks: tuple[Tensor, ...]) -> float | None:
    """Relative error at real positions; infinite where only the model's output is not finite anywhere; None
    where it is unknown which positions are real.
    """
    if not is_finite_where(found, expected):
        return float("inf")
    padded = [mask for mask in masks if not bool(mask.bool().all())]
    if padded and found.dim() > 1:
        rows = padded[0].shape[0]
        fitting = next((mask for mask in padded if mask.shape == found.shape[:2]), None)
        flat = next((mask for mask in padded if mask.numel() == found.shape[0]), None)
        if fitting is not None:
            found, expected = found[fitting.bool()], expected[fitting.bool()]
        elif flat is not None:
            found, expected = found[flat.flatten().bool()], expected[flat.flatten().bool()]
        elif found.shape[0] == rows and (found.dim() == 2 or found.shape[1] == 1):
            real = padded[-1].bool().any(dim=1)
            found, expected = found[real], expected[real]
        elif found.shape[0] == rows and found.dim() > 3:
            return None
    return relative_error(found, expected)
