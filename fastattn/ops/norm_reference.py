"""The norm operations in plain PyTorch: differentiable, exact in float64, what every other face is tested
against.

All compute in float32 (float64 where x is) and round once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from fastattn.ops.dropout import keep_mask

__all__ = [
    "QUANTIZED",
    "add_layer_norm_quantized_reference",
    "add_layer_norm_reference",
    "add_rms_norm_quantized_reference",
    "add_rms_norm_reference",
    "layer_norm_reference",
    "quantize_rows",
    "rms_norm_reference",
]

# Name -> the dtype of quantized rows and its largest magnitude.
QUANTIZED = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`fastattn::layer_norm`."""
    return _layer_norm(x, weight, bias, eps).to(x.dtype)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """`fastattn::rms_norm`."""
    return _rms_norm(x, weight, eps, offset).to(x.dtype)


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastattn::add_layer_norm`."""
    total = residual + _dropped(x, dropout_p, seed)
    return _layer_norm(total, weight, bias, eps).to(x.dtype), total


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastattn::add_rms_norm`."""
    total = residual + _dropped(x, dropout_p, seed)
    return _rms_norm(total, weight, eps, offset).to(x.dtype), total


def add_layer_norm_quantized_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    quantize: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::add_layer_norm_quantized`."""
    total = residual + _dropped(x, dropout_p, seed)
    return *quantize_rows(_layer_norm(total, weight, bias, eps), quantize), total


def add_rms_norm_quantized_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    dropout_p: float,
    seed: Tensor | None,
    quantize: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fastattn::add_rms_norm_quantized`."""
    total = residual + _dropped(x, dropout_p, seed)
    return *quantize_rows(_rms_norm(total, weight, eps, offset), quantize), total


def quantize_rows(x: Tensor, quantize: str) -> tuple[Tensor, Tensor]:
    """`x` [..., N] as quantized [..., N] and scales float32 [..., 1], with x ~= quantized * scales.

    Symmetric: a scale is the row's largest magnitude over the dtype's. A row whose scale would be zero or
    subnormal is zeros with scale 1, so that no division overflows; a row with a NaN has scale NaN.
    """
    dtype, largest = QUANTIZED[quantize]
    x = x.to(torch.float32)
    # A row of no elements has no largest.
    magnitude = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    scales = magnitude / largest
    scales = torch.where(scales < torch.finfo(torch.float32).tiny, 1.0, scales)
    scaled = (x / scales).clamp(-largest, largest)
    if dtype == torch.int8:
        # round() takes halves to even. The bits of an int8 NaN would be the machine's choice.
        scaled = scaled.round().nan_to_num(0.0)
    return scaled.to(dtype), scales


def _dropped(x: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if dropout_p == 0.0 or seed is None:
        return x
    if dropout_p == 1.0:
        return x * 0.0
    rows = torch.arange(x.numel() // max(1, x.shape[-1]), device=x.device).view(x.shape[:-1])
    return torch.where(keep_mask(seed, rows, x.shape[-1], dropout_p), x / (1.0 - dropout_p), 0.0)


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Before rounding to x's dtype."""
    dtype = _computing_dtype(x)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """Before rounding to x's dtype."""
    dtype = _computing_dtype(x)
    factor = None if weight is None else weight.to(dtype) + offset
    return rms_norm(x.to(dtype), x.shape[-1:], factor, eps)


def _computing_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
