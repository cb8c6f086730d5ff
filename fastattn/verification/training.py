"""Gradients of every parameter, in training mode with nothing random in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.verification.comparison import TOLERANCE, compare, real_positions
from fastattn.verification.report import CaseResult
from fastattn.verification.state import training
from fastattn.verification.subject import (
    Case,
    ModelFailed,
    Outputs,
    Replay,
    Subject,
    Unavailable,
    call,
    from_model,
    from_reference,
    layer_masks,
    masks_of,
)

__all__ = ["gradient_case", "parameter_of"]

NAME = "gradients"

_PREFIX = "gradient of "

# A parameter's gradient is held to its own largest value or to this much of the model's largest, whichever is
# more: some (a key's bias) are zero but for rounding.
_SMALL_GRADIENT = 0.05


def parameter_of(result: CaseResult) -> str | None:
    """The parameter whose gradient a result is about; None for a result about an output."""
    return result.output.removeprefix(_PREFIX) if result.output.startswith(_PREFIX) else None


def gradient_case(batch: Mapping[str, Any]) -> Case:
    """Outputs in training mode, then the gradients of a loss over all real positions; from float32 on."""

    def results(subject: Subject) -> Iterable[CaseResult]:
        names = _trained(subject.model)
        if not names:
            raise Unavailable("no parameter of the model requires a gradient")
        narrow = {
            str(p.dtype) for p in subject.model.parameters() if p.requires_grad and p.element_size() < 4
        }
        if narrow:
            raise Unavailable(
                f"its parameters are {', '.join(sorted(narrow))}; gradients are compared in float32"
            )
        with training(subject.model, subject.reference):
            wanted: dict[str, Tensor | None] = {}
            got: dict[str, Tensor | None] = {}
            expected = from_reference(lambda: _forward_backward(subject.reference, batch, wanted))
            found = from_model(lambda: _forward_backward(subject.model, batch, got))
        return [*compare(NAME, found, expected, masks_of(batch)), *_compare(got, wanted)]

    replay = Replay(
        lambda model: call(model, batch), lambda model: call(model, batch), layer_masks(batch), training
    )
    return Case(NAME, results, replay)


def _trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _forward_backward(
    model: nn.Module, batch: Mapping[str, Any], gradients: dict[str, Tensor | None]
) -> Outputs:
    """The outputs; `gradients` is filled. No parameter's `.grad` is touched."""
    with torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        outputs = call(model, batch)
        mask = masks_of(batch)
        losses = [
            _varied_sum(real_positions(name, value, mask(name)))
            for name, value in outputs.items()
            if value.is_floating_point() and value.requires_grad
        ]
        if not losses:
            raise ValueError("no output depends on a parameter that requires a gradient")
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(losses, list(parameters.values()), allow_unused=True)
        gradients.update(zip(parameters, found, strict=True))
    return {name: value.detach() for name, value in outputs.items()}


def _compare(got: Mapping[str, Tensor | None], wanted: Mapping[str, Tensor | None]) -> Iterable[CaseResult]:
    """Every gradient that fails, and the one closest to failing where none does."""
    different = sorted(set(got) ^ set(wanted))
    if different:
        raise ModelFailed(f"has other parameters that require a gradient than its reference: {different[:3]}")
    # In their own dtype: a model's gradients in float64 would be most of this case's time.
    sizes = {name: _largest(gradient) for name, gradient in wanted.items() if gradient is not None}
    largest = max(sizes.values(), default=0.0)
    results = []
    for name, own in got.items():
        want, output = wanted[name], f"{_PREFIX}{name}"
        if own is None or want is None:
            # None at all and zero are the same to an optimizer step.
            if _largest(own) != _largest(want):
                note = "is missing" if own is None else "is there, and the reference has none"
                results.append(CaseResult(NAME, output, float("inf"), TOLERANCE, largest, False, note))
            continue
        scale = max(sizes[name], _SMALL_GRADIENT * largest)
        worst = _largest(own - want)
        error = worst / scale if scale else worst
        results.append(CaseResult(NAME, output, error, TOLERANCE, scale, math.isfinite(worst)))
    failed = [result for result in results if not result.passed]
    return failed or sorted(results, key=lambda result: result.error)[-1:]


def _largest(gradient: Tensor | None) -> float:
    if gradient is None or gradient.numel() == 0:
        return 0.0
    largest: float = gradient.abs().max().item()
    return largest


def _varied_sum(value: Tensor) -> Tensor:
    """A sum with fixed, varied weights, so that no symmetry of the loss hides an error."""
    weights = torch.sin(torch.arange(value.numel(), device=value.device, dtype=torch.float32))
    value = torch.where(torch.isfinite(value), value, 0.0)
    return (value * weights.to(value.dtype).view(value.shape)).sum()
