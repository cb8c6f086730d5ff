"""Outputs against the reference's at real positions: what is compared, and how far off it may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.verification.report import CaseResult

__all__ = [
    "TOLERANCE",
    "Masks",
    "compare",
    "compare_outputs",
    "lone_padding",
    "named_tensors",
    "real_positions",
    "relative_error",
]

# Largest error relative to the reference output's largest value, float32.
TOLERANCE = 1e-4

# Name of an output -> the padding mask of its positions, or None.
Masks = Callable[[str], Tensor | None]

# What a single tensor without a name is called.
_LONE = "output"


def named_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of an output by name: of a tensor, mapping, dataclass or sequence, nested ones included.

    Caches and other objects are state, not an answer, and are left out.
    """
    if isinstance(value, Tensor):
        return {name or _LONE: value}
    if isinstance(value, Mapping):
        named = {str(key): each for key, each in value.items()}
    elif isinstance(value, (tuple, list)):
        named = {str(index): each for index, each in enumerate(value)}
    elif dataclasses.is_dataclass(value) and not name:
        named = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, each in named.items():
        found |= named_tensors(each, f"{name}.{key}" if name else key)
    return found


def real_positions(name: str, value: Tensor, mask: Tensor | None) -> Tensor:
    """What of an output is compared: real tokens where it has one value a token, else whole sequences.

    Args:
        name: the output's name.
        value: any shape.
        mask: [B, S] (or [B, choices, S]), nonzero where a position is real; None compares everything.
    """
    if mask is None or not value.shape or value.shape[0] != mask.shape[0]:
        return value
    real = mask.to(value.device) != 0
    # A pooled output is [B, H]: with H equal to the length it only looks like one value a token.
    per_token = value.shape[: real.dim()] == real.shape and "pool" not in name
    return value[real] if per_token else value[real.flatten(1).any(dim=1)]


def compare_outputs(
    case: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    mask: Tensor | None,
    truth: Mapping[str, Tensor] | None = None,
) -> Iterator[CaseResult]:
    """Every output of one batch at real positions; an output that is missing fails.

    Args:
        case: the batch's name.
        found: the outputs to judge.
        expected: the reference's.
        mask: the batch's padding mask, or None to compare all.
        truth: the float32 reference's outputs where both are half precision: what both errors are measured
            from.
    """
    return compare(case, found, expected, lambda name: mask, truth)


def compare(
    case: str,
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    masks: Masks,
    truth: Mapping[str, Tensor] | None = None,
    precision: torch.dtype | None = None,
) -> Iterator[CaseResult]:
    """`compare_outputs` with a mask for every output.

    Args:
        precision: the dtype the outputs were computed in, where it is not their own (autocast).
    """
    for name, value in expected.items():
        if name not in found:
            yield CaseResult(case, name, float("inf"), TOLERANCE, 0.0, False, "is missing")
            continue
        got = found[name]
        if got.shape != value.shape:
            note = f"has shape {list(got.shape)}, the reference's is {list(value.shape)}"
            yield CaseResult(case, name, float("inf"), TOLERANCE, 0.0, False, note)
            continue
        mask = masks(name)
        own = real_positions(name, value, mask)
        true = own if truth is None else real_positions(name, truth[name], mask)
        tolerance = TOLERANCE
        if truth is not None and value.is_floating_point():
            tolerance = 2 * relative_error(own, true) + 2 * torch.finfo(precision or value.dtype).eps
        error = relative_error(real_positions(name, got, mask), true)
        yield CaseResult(case, name, error, tolerance, _scale(true), is_finite_where(got, value))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, in units of the largest finite value of `expected`; the same infinities are no
    difference.
    """
    if expected.numel() == 0:
        return 0.0
    found, expected = found.detach().double(), expected.detach().double()
    difference = torch.where(found == expected, 0.0, found - expected)
    worst: float = difference.abs().max().item()
    scale = _scale(expected)
    return worst / scale if scale else worst


def is_finite_where(found: Tensor, expected: Tensor) -> bool:
    """Whether `found` is finite wherever `expected` is, padded positions included."""
    return bool((torch.isfinite(found) | ~torch.isfinite(expected)).all())


def _scale(value: Tensor) -> float:
    finite = value[torch.isfinite(value)]
    scale: float = finite.detach().abs().double().max().item() if finite.numel() else 0.0
    return scale


def lone_padding(
    run: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    batch: Mapping[str, Tensor],
    masks: Masks | None = None,
) -> Iterator[CaseResult]:
    """The batch with its second row all padding: finite, and without influence on the rows beside it.

    Args:
        run: the model, a batch to its outputs.
        batch: with an attention mask of three rows or more, a decoder's, or both.
        masks: which of them belongs to an output; default the attention mask.
    """
    padded = with_a_row_of_padding(batch)
    # A decoder's mask alone where the encoder takes images or recordings.
    own = padded.get("attention_mask", padded.get("decoder_attention_mask"))
    if own is None:
        raise ValueError(f"the batch has no attention mask; it has {', '.join(batch)}")
    rows = own.shape[0]
    kept = [0, *range(2, rows)]
    with torch.no_grad():
        together = run(padded)
        alone = run({name: tensor[kept] for name, tensor in padded.items()})
    for name, value in together.items():
        if value.shape[:1] != (rows,) or not value.is_floating_point():
            continue
        of_kept = value[kept]
        if of_kept.shape != alone[name].shape and value.shape[:2] == (rows, rows):
            # One value for every pair of rows (CLIP).
            of_kept = of_kept[:, kept]
        mask = own if masks is None else masks(name)
        own_mask = None if mask is None else mask[kept]
        expected = real_positions(name, alone[name], own_mask)
        error = relative_error(real_positions(name, of_kept, own_mask), expected)
        eps = torch.finfo(value.dtype).eps if value.dtype in (torch.float16, torch.bfloat16) else 0.0
        finite = bool(torch.isfinite(value).all())
        tolerance = max(TOLERANCE, 4 * eps)
        yield CaseResult("a row of padding", name, error, tolerance, _scale(expected), finite)


def with_a_row_of_padding(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with nothing but padding in its second row, of the decoder's tokens too."""
    padded = dict(batch)
    for name in ("attention_mask", "decoder_attention_mask"):
        if name in batch:
            padded[name] = batch[name].clone()
            padded[name][1] = 0
    return padded
