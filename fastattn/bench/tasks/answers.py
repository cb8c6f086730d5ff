"""Answers as named tensors, and how far those of a lower precision are from the right ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from fastattn.bench.contenders.source import DTYPES
from fastattn.bench.parity import Parity, compare, floating_tensors
from fastattn.verification import real_positions
from fastattn.verification.likeness import gate, likeness

__all__ = ["compared", "kind_of_figure", "main_name", "named", "without_mean"]


def main_name(expected: Mapping[str, Tensor]) -> str:
    """The output that every contender must have: hidden states, else logits, else the first there is."""
    return next((name for name in ("last_hidden_state", "logits") if name in expected), next(iter(expected)))


def named(output: Any, main: str) -> dict[str, Tensor]:
    """An output's floating-point tensors by name, in float64 on the CPU; a lone one is the main output."""
    found = floating_tensors(output)
    lone = set(found) == {"output"}
    return {main: found["output"]} if lone else found


def compared(
    precision: str,
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    limit: float,
    mask: Tensor | None,
) -> Parity:
    """The worst of the outputs that both have, at real positions.

    fp32, bf16 and fp16: the largest difference over the output's largest value. Precisions below: 1 less the
    mean `likeness` to the right ones (cosines of tokens' hidden states or logits), with the gate that exports
    in that precision have; the least alike, of those that miss their gate if any does.

    Args:
        found: may lack outputs, but not the main one.
        limit: the largest accepted figure; an output of few columns may have a stricter gate.
        mask: int64 [batch, sequence], or None where every position is compared.

    Raises:
        ValueError: the main output is missing, or an output has another shape.
    """
    main = main_name(expected)
    if main not in found:
        raise ValueError(
            f"the output has no {main!r}; it has {', '.join(found) or 'no floating-point tensor'}"
        )
    wanted = {name: value for name, value in expected.items() if name in found}
    if precision in DTYPES:
        return compare(wanted, found, mask=mask, tolerance=limit, kind=kind_of_figure(precision))
    figures = []
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise ValueError(
                f"output {name!r} has shape {list(found[name].shape)}, the reference's is {list(value.shape)}"
            )
        right = real_positions(name, value, mask)
        # Rounding puts equal rows a little beyond 1.
        loss = (1 - likeness(real_positions(name, found[name], mask), right).mean()).clamp(min=0).item()
        kept = gate(precision, right)
        allowed = limit if kept is None else min(limit, 1 - kept)
        figures.append(Parity(loss, 1.0, allowed, "precision", name))
    return max(figures, key=lambda each: (not each.passed, _nan_last(each.relative_error)))


def kind_of_figure(precision: str) -> Literal["parity", "precision"]:
    """Whether an answer must agree with the reference, or may lose what its precision loses."""
    return "parity" if precision == "fp32" else "precision"


def without_mean(logits: Tensor) -> Tensor:
    """Logits less their mean over the vocabulary: the same probabilities.

    What lower precisions lose is measured on these. Some models' logits share a large offset (GPT-2's are all
    about -100 and differ by a few), beside which any two rows look alike.
    """
    return logits - logits.mean(-1, keepdim=True)


def _nan_last(figure: float) -> float:
    return math.inf if math.isnan(figure) else figure
