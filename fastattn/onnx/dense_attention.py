"""ONNX subgraphs of attention over [batch, heads, length, head_dim]: the fused operator, else plain ONNX."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.graph import CONTRIB_DOMAIN, emit, vector

__all__ = ["MASKED_SCORE", "fused_attention", "plain_attention"]

# Score of a hidden key in MultiHeadAttention: finite, or a row that sees nothing would be NaN; the operator's
# own default of -10000 is within reach of real scores.
MASKED_SCORE = -3.0e38


def fused_attention(query: Any, key: Any, value: Any, mask: Any | None, scale: float) -> Any:
    """com.microsoft.MultiHeadAttention under a padding mask [B, Sk] or none; as many key as query heads.

    Without a mask ONNX Runtime's CPU kernel never holds the scores; with one it does, and still beats MatMul
    and Softmax by a tenth (8 x 128 tokens, BERT-base). Its bias input would save nothing: Gemm adds a bias
    for free.
    """
    heads, head_dim = query.shape[1], value.shape[3]
    out = emit(
        "MultiHeadAttention",
        [*(_length_major(x) for x in (query, key, value)), None, None if mask is None else _int32(mask)],
        CONTRIB_DOMAIN,
        num_heads=heads,
        scale=scale,
        mask_filter_value=MASKED_SCORE,
    )
    if mask is not None:
        # Where nothing may be attended the operator averages all values.
        sees_something = op.Cast(op.ReduceMax(_int32(mask), [1], keepdims=1), to=ir.DataType.BOOL)
        out = op.Where(op.Unsqueeze(sees_something, [2]), out, op.Constant(value_float=0.0))
    return op.Transpose(op.Reshape(out, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def _length_major(x: Any) -> Any:
    """[B, H, S, D] -> [B, S, H * D]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, x.shape[1] * x.shape[3]])


def _int32(mask: Any) -> Any:
    return op.Cast(mask, to=ir.DataType.INT32)


def plain_attention(
    query: Any,
    key: Any,
    value: Any,
    mask: Any | None,
    bias: Any | None,
    key_lengths: Any | None,
    query_start: Any | None,
    scale: float,
    return_lse: bool,
    *,
    group: int,
    dtype: Any,
) -> tuple[Any, Any | None]:
    """The formula in standard operators, in float32 at least, for every argument of `fastattn::attention`.

    Args:
        query, key, value: [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv].
        mask: bool [B, Sk] or 4-D, or None.
        bias: float 4-D, or None.
        key_lengths: integers [B], or None.
        query_start: what causality counts from, int64 scalar or [B]; None where it is not causal.
        group: Hq / Hkv.
        dtype: of query and of out. (The shapes and dtypes of values between translations are not known here.)

    Returns:
        out [B, Hq, Sq, Dv] and float32 lse [B, Hq, Sq], None where not asked for.
    """
    computing = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    query, key, value = (op.Cast(x, to=computing) for x in (query, key, value))
    key_range = op.Range(0, op.Squeeze(op.Shape(key, start=2, end=3), [0]), 1)
    present = None
    if key_lengths is not None:
        present = op.Less(key_range, op.Unsqueeze(op.Cast(key_lengths, to=ir.DataType.INT64), [1]))
        # What lies past the length may be NaN: it must not enter a product.
        kept = op.Unsqueeze(present, [1, 3])
        zero = op.CastLike(0.0, key)
        key, value = op.Where(kept, key, zero), op.Where(kept, value, zero)
    key, value = _repeat_heads(key, group), _repeat_heads(value, group)
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), op.CastLike(scale, query))
    if bias is not None:
        scores = op.Add(scores, op.Cast(bias, to=computing))
    for visible in _visible(query, key_range, mask, present, query_start):
        scores = op.Where(visible, scores, op.CastLike(float("-inf"), scores))
    # A row that sees nothing has the maximum -inf and the sum 0: both are replaced before they make a NaN.
    maximum = op.ReduceMax(scores, [-1], keepdims=1)
    maximum = op.Where(op.IsInf(maximum), op.CastLike(0.0, maximum), maximum)
    exponentials = op.Exp(op.Sub(scores, maximum))
    total = op.ReduceSum(exponentials, [-1], keepdims=1)
    nothing = op.Equal(total, op.CastLike(0.0, total))
    divisor = op.Where(nothing, op.CastLike(1.0, total), total)
    out = op.Cast(op.Div(op.MatMul(exponentials, value), divisor), to=dtype)
    if not return_lse:
        return out, None
    lse = op.Where(nothing, op.CastLike(float("-inf"), total), op.Add(op.Log(divisor), maximum))
    return out, op.Cast(op.Squeeze(lse, [3]), to=ir.DataType.FLOAT)


def _visible(
    query: Any, key_range: Any, mask: Any | None, present: Any | None, query_start: Any | None
) -> list[Any]:
    """What hides keys, each bool and broadcastable to [B, Hq, Sq, Sk]."""
    found = []
    if mask is not None:
        found.append(op.Unsqueeze(mask, [1, 2]) if len(mask.shape) == 2 else mask)
    if present is not None:
        found.append(op.Unsqueeze(present, [1, 2]))
    if query_start is not None:
        rows = op.Unsqueeze(op.Range(0, op.Squeeze(op.Shape(query, start=2, end=3), [0]), 1), [1])
        start = op.Reshape(query_start, [-1, 1, 1, 1])
        found.append(op.LessOrEqual(key_range, op.Add(rows, start)))
    return found


def _repeat_heads(x: Any, group: int) -> Any:
    """[B, Hkv, S, D] -> [B, Hkv * group, S, D], every head `group` times in a row."""
    if group == 1:
        return x
    repeated = op.Expand(op.Unsqueeze(x, [2]), vector(1, 1, group, 1, 1))
    heads = op.Mul(op.Shape(x, start=1, end=2), vector(group))
    shape = op.Concat(op.Shape(x, start=0, end=1), heads, op.Shape(x, start=2, end=4), axis=0)
    return op.Reshape(repeated, shape)
