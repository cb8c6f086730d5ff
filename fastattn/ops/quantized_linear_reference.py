"""`quantized_linear` in plain PyTorch: what every other face is tested against, and what a GPU runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, relu, silu

from fastattn.ops.norm_reference import quantize_rows
from fastattn.ops.packed_weight import PackedWeight

__all__ = ["ACTIVATIONS", "activated", "quantized_linear_reference"]

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def quantized_linear_reference(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """x [..., K] to [..., N] in x's dtype; computes in float32, or float64 where x is float64.

    "int8" and "fp8" quantize the rows of x as `add_layer_norm(quantize=...)` does; sums of their products are
    exact in float64, and in float32 as exact as float32 sums are.
    """
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(computing)
    if packed.input_scales is not None:
        rows = rows / packed.input_scales
    weight = packed.stored_weight(computing)
    if packed.scheme in ("int8", "fp8"):
        numbers, scales = quantize_rows(rows, packed.scheme)
        # A row that is not finite has no scale: all of its results are NaN. Its numbers may be NaN (float8),
        # and stay in the row.
        scales = torch.where(scales.isfinite(), scales, torch.nan).to(computing)
        result = linear(numbers.to(computing), weight) * scales
    else:
        # By the magnitudes of a whole row, as where it is split into integers.
        finite = rows.isfinite().all(-1, keepdim=True)
        result = linear(torch.where(finite, rows, 0.0), weight)
        result = torch.where(finite, result, torch.nan)
    if bias is not None:
        result = result + bias.to(computing)
    return activated(result, activation).to(x.dtype)


def activated(x: Tensor, activation: str | None) -> Tensor:
    """`activation` of x."""
    if activation == "relu":
        return relu(x)
    if activation == "silu":
        return silu(x)
    if activation is None:
        return x
    return gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")
