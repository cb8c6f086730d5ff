"""ONNX faces of the norms, alone, after a residual addition, and quantized by rows."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from fastattn.onnx.graph import cast, computing_dtype, emit, number
from fastattn.onnx.targets import FIRST_OPSET_WITH_ATTENTION, current_target
from fastattn.ops.norm_reference import QUANTIZED

__all__ = [
    "add_layer_norm",
    "add_layer_norm_quantized",
    "add_rms_norm",
    "add_rms_norm_quantized",
    "layer_norm",
    "rms_norm",
]


def layer_norm(x: Any, weight: Any, bias: Any, eps: float) -> Any:
    """`fastattn::layer_norm`."""
    return _rounded(_layer_norm(x, weight, bias, eps, like=x), x)


def rms_norm(x: Any, weight: Any, eps: float, offset: float) -> Any:
    """`fastattn::rms_norm`."""
    return _rounded(_rms_norm(x, weight, eps, offset, like=x), x)


def add_layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, dropout_p: float, seed: Any
) -> tuple[Any, Any]:
    """`fastattn::add_layer_norm` as the target's addition and LayerNormalization."""
    total = _added(residual, x)
    return _rounded(_layer_norm(total, weight, bias, eps, like=x), x), total


def add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: float, offset: float, dropout_p: float, seed: Any
) -> tuple[Any, Any]:
    """`fastattn::add_rms_norm`, as `add_layer_norm`."""
    total = _added(residual, x)
    return _rounded(_rms_norm(total, weight, eps, offset, like=x), x), total


def add_layer_norm_quantized(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, dropout_p: float, seed: Any, quantize: str
) -> tuple[Any, Any, Any]:
    """`fastattn::add_layer_norm_quantized`."""
    total = _added(residual, x)
    return *_quantized(_layer_norm(total, weight, bias, eps, like=x), quantize), total


def add_rms_norm_quantized(
    x: Any, residual: Any, weight: Any, eps: float, offset: float, dropout_p: float, seed: Any, quantize: str
) -> tuple[Any, Any, Any]:
    """`fastattn::add_rms_norm_quantized`."""
    total = _added(residual, x)
    return *_quantized(_rms_norm(total, weight, eps, offset, like=x), quantize), total


def _added(residual: Any, x: Any) -> Any:
    """By the operator that the target's runtime treats best, see `Target.addition`."""
    return op.Sum(residual, x) if current_target().addition == "Sum" else op.Add(residual, x)


def _layer_norm(x: Any, weight: Any | None, bias: Any | None, eps: float, like: Any) -> Any:
    """Not rounded to the dtype of `like`, whose dtype and last dimension are those of x."""
    computing = computing_dtype(like.dtype)
    if weight is None:
        weight = op.ConstantOfShape([like.shape[-1]], value=ir.tensor([1.0], dtype=computing))
    weight, bias = (None if each is None else cast(each, each.dtype, computing) for each in (weight, bias))
    rows = cast(x, like.dtype, computing)
    return emit("LayerNormalization", [rows, weight, bias], axis=-1, epsilon=eps)


def _rms_norm(x: Any, weight: Any | None, eps: float, offset: float, like: Any) -> Any:
    """Not rounded to the dtype of `like`, which is that of x.

    RMSNormalization where the opset has it; else the pattern that ONNX Runtime replaces by the same kernel
    when it loads the model, at half the pattern's time (1024 x 768).
    """
    computing = computing_dtype(like.dtype)
    rows = cast(x, like.dtype, computing)
    if current_target().opset >= FIRST_OPSET_WITH_ATTENTION:
        if weight is None:
            factor = op.ConstantOfShape([like.shape[-1]], value=ir.tensor([1.0], dtype=computing))
        else:
            factor = cast(weight, weight.dtype, computing)
        if weight is not None and offset != 0.0:
            factor = op.Add(factor, number(offset, computing))
        return emit("RMSNormalization", [rows, factor], axis=-1, epsilon=eps)
    mean = op.ReduceMean(op.Pow(rows, number(2.0, computing)), [-1], keepdims=1)
    normalized = op.Div(rows, op.Sqrt(op.Add(mean, number(eps, computing))))
    if weight is None:
        return normalized
    factor = cast(weight, weight.dtype, computing)
    if offset != 0.0:
        factor = op.Add(factor, number(offset, computing))
    return op.Mul(normalized, factor)


def _rounded(normalized: Any, like: Any) -> Any:
    return cast(normalized, computing_dtype(like.dtype), like.dtype)


def _quantized(x: Any, quantize: str) -> tuple[Any, Any]:
    """Rows [..., N] as int8 or float8 and their scales float32 [..., 1]: `quantize_rows` of the reference."""
    dtype, largest = QUANTIZED[quantize]
    x = op.Cast(x, to=ir.DataType.FLOAT)
    scales = op.Div(op.ReduceMax(op.Abs(x), [-1], keepdims=1), largest)
    tiny = torch.finfo(torch.float32).tiny
    scales = op.Where(op.Less(scales, tiny), 1.0, scales)
    scaled = op.Clip(op.Div(x, scales), -largest, largest)
    if dtype == torch.int8:
        # Halves go to even. The bits of an int8 NaN would be the machine's choice.
        scaled = op.Round(scaled)
        return op.Cast(op.Where(op.IsNaN(scaled), 0.0, scaled), to=ir.DataType.INT8), scales
    return op.Cast(scaled, to=ir.DataType.FLOAT8E4M3FN), scales
