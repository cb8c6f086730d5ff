"""Is the answer still right: a contender's output against the reference's, at real positions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

__all__ = ["FP32_TOLERANCE", "Parity", "compare", "floating_tensors", "precision_tolerance"]

FP32_TOLERANCE = 1e-4
# A lower precision that moves outputs by more than a tenth of their scale is not the same model any more.
_MAXIMUM_PRECISION_LOSS = 0.1
# What an output without names is called.
_TOP = "output"


@dataclass(frozen=True)
class Parity:
    """The largest error of an output, with the gate it is held to.

    Attributes:
        max_abs_error: largest absolute difference over real positions, in the output worst for its scale.
        scale: the reference's largest absolute value in that output, over the same positions.
        tolerance: the largest accepted `relative_error`.
        kind: "parity" (same precision, must agree) or "precision" (a lower one, with a gate of its own).
        output: the name of that output.
    """

    max_abs_error: float
    scale: float
    tolerance: float
    kind: Literal["parity", "precision"] = "parity"
    output: str = ""

    @property
    def relative_error(self) -> float:
        """`max_abs_error` over the scale; infinite where the reference is all zero and the output is not."""
        if self.scale > 0 or math.isnan(self.max_abs_error):
            return self.max_abs_error / (self.scale or 1.0)
        return 0.0 if self.max_abs_error == 0 else math.inf

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.relative_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values; a figure JSON cannot hold (infinite or not a number) is a string."""
        values = {**asdict(self), "relative_error": self.relative_error, "passed": self.passed}
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        sign = "<=" if self.passed else ">"
        kind = "" if self.kind == "parity" else " precision"
        return f"{self.relative_error:.1e} {sign} {self.tolerance:.0e}{kind}"


def precision_tolerance(
    untouched: Parity, dtype_eps: float, maximum: float = _MAXIMUM_PRECISION_LOSS
) -> float:
    """The gate on precision loss: twice the untouched model's in that dtype plus 2 eps, at most `maximum`."""
    gate = 2 * untouched.relative_error + 2 * dtype_eps
    # Written so that a NaN, from an untouched model that overflows, gives the bound.
    return gate if gate < maximum else maximum


def compare(
    reference: Any,
    output: Any,
    *,
    mask: torch.Tensor | None = None,
    tolerance: float = FP32_TOLERANCE,
    kind: Literal["parity", "precision"] = "parity",
) -> Parity:
    """Compare an output with the reference's, over real positions, in float64.

    Args:
        reference, output: a tensor, array, mapping of names (a transformers output) or sequence of these.
            Every floating-point tensor of the reference must be in the output, under the same name and of the
            same shape.
        mask: [B, S], nonzero where a position is real; None compares everything. Outputs that begin with [B,
            S] are compared at real positions, others that begin with B at the sequences that have one.
        tolerance: the largest accepted error relative to the reference's largest value.
        kind: "parity", or "precision" where the output was computed in a lower precision.

    Returns:
        The figure of the output that is worst relative to its scale.

    Raises:
        ValueError: an output is missing or has another shape, or the reference holds nothing to compare.

    Example:
        >>> import torch
        >>> compare(torch.ones(2, 3), torch.ones(2, 3)).passed
        True
    """
    from fastattn.verification import real_positions

    expected = floating_tensors(reference)
    if not expected:
        raise ValueError("the reference output holds no floating-point tensor to compare")
    found = floating_tensors(output)
    worst: Parity | None = None
    for name, wanted in expected.items():
        if name not in found:
            raise ValueError(
                f"the output has no {name!r}; it has {', '.join(found) or 'no floating-point tensor'}"
            )
        got = found[name]
        if got.shape != wanted.shape:
            raise ValueError(
                f"output {name!r} has shape {list(got.shape)}, the reference's is {list(wanted.shape)}"
            )
        wanted, got = real_positions(name, wanted, mask), real_positions(name, got, mask)
        error = (wanted - got).abs().max().item() if wanted.numel() else 0.0
        scale = wanted.abs().max().item() if wanted.numel() else 0.0
        figure = Parity(error, scale, tolerance, kind, name)
        if worst is None or not figure.relative_error <= worst.relative_error:
            worst = figure
        if math.isnan(worst.relative_error):
            break
    assert worst is not None
    return worst


def floating_tensors(value: Any, name: str = _TOP) -> dict[str, torch.Tensor]:
    """Every floating-point tensor of an output by name, as float64 on the CPU."""
    import numpy as np
    import torch

    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor):
        return {name: value.detach().double().cpu()} if value.is_floating_point() else {}
    if isinstance(value, Mapping):
        named = dict(value)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        named = {f"{name}[{index}]": each for index, each in enumerate(value)}
    elif name == _TOP:
        named = dict(getattr(value, "__dict__", {}))
    else:  # a cache, say: state, not an answer
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, each in named.items():
        if not key.startswith("_"):
            found |= floating_tensors(each, key)
    return found
