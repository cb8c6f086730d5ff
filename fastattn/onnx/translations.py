"""The ONNX face of every operation: one function each, emitting what ONNX Runtime's CPU runs fastest.

Each takes its operator's arguments, tensors as ONNX values, and is called while `torch.onnx.export` records
nodes. Opset 20 and com.microsoft version 1. Dropout is checked before translation: see
`fastattn.onnx.convert`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

import fastattn.ops  # noqa: F401 -- registers the operators
from fastattn.onnx.dense_attention import fused_attention, plain_attention
from fastattn.onnx.graph import CONTRIB_DOMAIN, emit, vector
from fastattn.onnx.packed_attention import attend_each_sequence, attend_padded

__all__ = ["TRANSLATIONS"]

_FUSED_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any,
    bias: Any,
    key_lengths: Any,
    causal: bool,
    query_start: Any,
    query_starts: Any,
    scale: float,
    dropout_p: float,
    seed: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """`fastattn::attention`: MultiHeadAttention under a padding mask or none, plain ONNX for all else."""
    fused = (
        bias is None
        and key_lengths is None
        and not causal
        and not return_lse
        and query.shape[1] == key.shape[1]
        and query.dtype in _FUSED_DTYPES
    )
    padding_mask = mask
    if mask is not None and len(mask.shape) == 4:
        if fused and mask.shape[1] == mask.shape[2] == 1 and mask.shape[0] == query.shape[0]:
            padding_mask = op.Squeeze(mask, [1, 2])
        else:
            fused = False
    if fused:
        return fused_attention(query, key, value, padding_mask, scale), _no_lse()
    start = _int64(query_start if query_starts is None else query_starts) if causal else None
    out, lse = plain_attention(
        query,
        key,
        value,
        mask,
        bias,
        key_lengths,
        start,
        scale,
        return_lse,
        group=query.shape[1] // key.shape[1],
        dtype=query.dtype,
    )
    return out, _no_lse() if lse is None else lse


def varlen_attention(
    query: Any,
    key: Any,
    value: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    causal: bool,
    query_start: Any,
    query_starts: Any,
    default_start: bool,
    scale: float,
    dropout_p: float,
    seed: Any,
    return_lse: bool,
) -> tuple[Any, Any]:
    """`fastattn::varlen_attention`: a loop over the sequences; padded and plain where that cannot serve."""
    same_heads = query.shape[1] == key.shape[1]
    if not causal and not return_lse and same_heads and query.dtype in _FUSED_DTYPES:
        return attend_each_sequence(query, key, value, cu_seqlens_q, cu_seqlens_k, scale), _no_lse()
    start = None if default_start else _int64(query_start if query_starts is None else query_starts)
    out, lse = attend_padded(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, start, scale, return_lse)
    return out, _no_lse() if lse is None else lse


def _no_lse() -> Any:
    return op.Constant(value=ir.tensor([], dtype=ir.DataType.FLOAT))


def _int64(x: Any) -> Any:
    """An int, a scalar or a vector as an int64 value."""
    return op.Constant(value_int=x) if isinstance(x, int) else op.Cast(x, to=ir.DataType.INT64)


def add_layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, eps: float, dropout_p: float, seed: Any
) -> tuple[Any, Any]:
    """`fastattn::add_layer_norm` as Sum and LayerNormalization.

    Not Add: ONNX Runtime would fuse it into SkipLayerNormalization, on the CPU a scalar loop seven times
    slower.
    """
    total = op.Sum(residual, x)
    width = x.shape[-1]
    if weight is None:
        weight = op.ConstantOfShape([width], value=ir.tensor([1.0], dtype=x.dtype))
    elif weight.dtype != x.dtype:
        weight = op.CastLike(weight, x)
    if bias is not None and bias.dtype != x.dtype:
        bias = op.CastLike(bias, x)
    return emit("LayerNormalization", [total, weight, bias], axis=-1, epsilon=eps), total


def bias_gelu(x: Any, bias: Any, approximate: str) -> Any:
    """`fastattn::bias_gelu`.

    After a matrix product the bias moves into it (see `rewrites`): Gemm then Gelu takes half the time of
    MatMul then BiasGelu. The tanh form is the contrib FastGelu, a third faster than Gelu's own.
    """
    total = op.Add(x, bias)
    if approximate == "tanh" and x.dtype in _FUSED_DTYPES:
        return emit("FastGelu", [total], CONTRIB_DOMAIN)
    return op.Gelu(total, approximate=approximate)


def packed_linear(x: Any, weights: Sequence[Any], biases: Sequence[Any]) -> list[Any]:
    """`fastattn::packed_linear`: one Gemm a weight.

    One product over the joined weights is no faster on the CPU, and splitting its result is a copy
    (BERT-base, 481 tokens: 5.4 ms against 7.3 ms with the Split).
    """
    rows = _rows(x)
    missing: list[Any] = [None] * len(weights)
    return [
        _like_rows_of(x, _gemm(rows, weight, bias))
        for weight, bias in zip(weights, biases or missing, strict=True)
    ]


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """`aten::linear` as Gemm over rows, with the weight as PyTorch stores it.

    The exporter's own translation transposes the weight, which stores a tied embedding twice, and adds the
    bias in a pass of its own where x is not a matrix.
    """
    return _like_rows_of(x, _gemm(_rows(x), weight, bias))


def _gemm(rows: Any, weight: Any, bias: Any) -> Any:
    return op.Gemm(rows, weight, bias, transB=1)


def _rows(x: Any) -> Any:
    """[..., K] -> [rows, K], without a copy."""
    return x if len(x.shape) == 2 else op.Reshape(x, [-1, x.shape[-1]])


def _like_rows_of(x: Any, rows: Any) -> Any:
    """[rows, N] -> [..., N], the leading dimensions those of x."""
    if len(x.shape) == 2:
        return rows
    if len(x.shape) == 3 and x.shape[0] == 1:
        return op.Unsqueeze(rows, [0])
    leading = op.Shape(x, start=0, end=-1)
    return op.Reshape(rows, op.Concat(leading, vector(-1), axis=0))


def select(x: Any, dim: int, index: Any) -> Any:
    """`aten::select`: the only element of a dimension is a view; the exporter's own Gather would copy."""
    if isinstance(index, int) and x.shape[dim] == 1:
        return op.Squeeze(x, [dim])
    return op.Gather(x, _int64(index), axis=dim)


def index_copy(x: Any, dim: int, index: Any, source: Any) -> Any:
    """`aten::index_copy`, which puts packed rows back; the exporter's decomposition copies them again."""
    indices, updates = op.Unsqueeze(index, [-1]), source
    if dim == 0:
        return op.ScatterND(x, indices, updates)
    perm = list(range(len(x.shape)))
    perm[0], perm[dim] = perm[dim], perm[0]
    scattered = op.ScatterND(op.Transpose(x, perm=perm), indices, op.Transpose(updates, perm=perm))
    return op.Transpose(scattered, perm=perm)


# Operator -> its translation. The aten operators are translated again because the exporter's own choice costs
# copies.
TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.fastattn.attention.default: attention,
    torch.ops.fastattn.varlen_attention.default: varlen_attention,
    torch.ops.fastattn.add_layer_norm.default: add_layer_norm,
    torch.ops.fastattn.bias_gelu.default: bias_gelu,
    torch.ops.fastattn.packed_linear.default: packed_linear,
    torch.ops.aten.linear.default: linear,
    torch.ops.aten.select.int: select,
    torch.ops.aten.index_copy.default: index_copy,
}
