"""ONNX subgraphs of attention over [batch, heads, length, head_dim]: the fused operator, else plain ONNX."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.cross_cache import is_chosen
from fastattn.onnx.graph import CONTRIB_DOMAIN, computing_dtype, emit, number, vector
from fastattn.onnx.score_terms import Positions, position_bias, present_keys, visible_keys
from fastattn.onnx.standard_attention import standard_attention
from fastattn.ops.attention_terms import AttentionTerms

__all__ = [
    "MASKED_SCORE",
    "fused_attention",
    "operator_attention",
    "plain_attention",
    "within_fused_operator",
]

# Score of a hidden key in MultiHeadAttention: finite, or a row that sees nothing would be NaN; the operator's
# own default of -10000 is within reach of real scores.
MASKED_SCORE = -3.0e38


def within_fused_operator(terms: AttentionTerms) -> bool:
    """Whether MultiHeadAttention computes this, its mask aside: relative bias and ALiBi, but no bias of the
    caller's, whose -inf could hide a whole row.
    """
    return (
        terms.bias is None
        and terms.key_lengths is None
        and terms.reach == (-1, -1)
        and terms.softcap == 0.0
        and terms.sinks is None
        and not terms.return_lse
    )


def fused_attention(query: Any, key: Any, value: Any, mask: Any | None, terms: AttentionTerms) -> Any:
    """com.microsoft.MultiHeadAttention under a padding mask [B, Sk] or none; as many key as query heads.

    Without a mask and a bias ONNX Runtime's CPU kernel never holds the scores; with one it does, and still
    beats MatMul and Softmax by a tenth (8 x 128 tokens, BERT-base). Its bias input would save nothing: Gemm
    adds a bias for free.
    """
    heads, head_dim = query.shape[1], value.shape[3]
    out = emit(
        "MultiHeadAttention",
        [
            _length_major(query),
            # Those of a cross-attention's cache are taken as they lie.
            *(x if is_chosen(x) else _length_major(x) for x in (key, value)),
            None,
            None if mask is None else _int32(mask),
            position_bias(terms, _positions(query, key, terms), query.dtype),
        ],
        CONTRIB_DOMAIN,
        num_heads=heads,
        scale=terms.scale,
        mask_filter_value=MASKED_SCORE,
    )
    if mask is not None:
        # Where nothing may be attended the operator averages all values.
        sees_something = op.Cast(op.ReduceMax(_int32(mask), [1], keepdims=1), to=ir.DataType.BOOL)
        out = op.Where(op.Unsqueeze(sees_something, [2]), out, number(0.0, query.dtype))
    return op.Transpose(op.Reshape(out, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def operator_attention(query: Any, key: Any, value: Any, terms: AttentionTerms) -> Any:
    """ai.onnx's Attention for every argument `within_standard_operator`.

    Where the keys were made of rows by a transposition, as products make them, the operator gets the rows:
    the transpositions cancel. Keys that stand by heads already, a cache's, are not moved.
    """
    heads = (query.shape[1], key.shape[1])
    mask: Any = terms.mask
    of_heads = mask is not None and len(mask.shape) == 4 and mask.shape[1] != 1
    made = key.producer()
    if of_heads or made is None or made.op_type != "Transpose":
        return standard_attention(query, key, value, terms, heads=heads, dtype=query.dtype)
    rows = standard_attention(
        _length_major(query),
        _length_major(key),
        _length_major(value),
        terms,
        heads=heads,
        dtype=query.dtype,
        length_major=True,
    )
    return op.Transpose(op.Reshape(rows, [0, 0, heads[0], value.shape[3]]), perm=[0, 2, 1, 3])


def _positions(query: Any, key: Any, terms: AttentionTerms) -> Positions:
    """Of [B, H, S, D]."""
    return Positions(op.Shape(query, start=2, end=3), op.Shape(key, start=2, end=3), terms)


def _length_major(x: Any) -> Any:
    """[B, H, S, D] -> [B, S, H * D]."""
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, x.shape[1] * x.shape[3]])


def _int32(mask: Any) -> Any:
    return op.Cast(mask, to=ir.DataType.INT32)


def plain_attention(
    query: Any,
    key: Any,
    value: Any,
    terms: AttentionTerms,
    *,
    heads: tuple[int, int],
    dtype: Any,
) -> tuple[Any, Any | None]:
    """The formula in standard operators, in float32 at least, for every argument of `fastattn::attention`.

    Args:
        query, key, value: [B, Hq, Sq, D], [B, Hkv, Sk, D], [B, Hkv, Sk, Dv].
        terms: the other arguments, tensors as graph values; the mask's shape must be known.
        heads: Hq and Hkv.
        dtype: of query and of out. (The shapes and dtypes of values between translations are not known here.)

    Returns:
        out [B, Hq, Sq, Dv] and float32 lse [B, Hq, Sq], None where not asked for.
    """
    computing = computing_dtype(dtype)
    positions = _positions(query, key, terms)
    query, key, value = (op.Cast(x, to=computing) for x in (query, key, value))
    present = present_keys(terms, positions)
    if present is not None:
        # What lies past the length may be NaN: it must not enter a product.
        kept = op.Unsqueeze(present, vector(1, 3))
        key, value = (op.Where(kept, x, number(0.0, computing)) for x in (key, value))
    scores = _per_query_head(
        op.MatMul(
            _per_key_head(op.Mul(query, number(terms.scale, computing)), heads),
            op.Transpose(key, perm=[0, 1, 3, 2]),
        ),
        heads,
    )
    if terms.softcap > 0.0:
        cap = number(terms.softcap, computing)
        scores = op.Mul(op.Tanh(op.Div(scores, cap)), cap)
    for added in (terms.bias, position_bias(terms, positions, computing)):
        if added is not None:
            scores = op.Add(scores, op.Cast(added, to=computing))
    visible = visible_keys(terms, positions, present)
    if terms.bias is None and terms.sinks is None and not terms.return_lse:
        out = op.MatMul(_per_key_head(_weights(scores, visible, computing), heads), value)
        return op.Cast(_blank(_per_query_head(out, heads), visible, computing), to=dtype), None
    if visible is not None:
        scores = op.Where(visible, scores, number(float("-inf"), computing))
    maximum = op.ReduceMax(scores, [-1], keepdims=1)
    sinks = None
    if terms.sinks is not None:
        sinks = op.Reshape(op.Cast(terms.sinks, to=computing), vector(1, -1, 1, 1))
        maximum = op.Max(maximum, sinks)
    # A row that sees nothing has the maximum -inf and the sum 0: both are replaced before they make a NaN.
    maximum = op.Where(op.IsInf(maximum), number(0.0, computing), maximum)
    exponentials = op.Exp(op.Sub(scores, maximum))
    total = op.ReduceSum(exponentials, [-1], keepdims=1)
    if sinks is not None:
        total = op.Add(total, op.Exp(op.Sub(sinks, maximum)))
    nothing = op.Equal(total, number(0.0, computing))
    divisor = op.Where(nothing, number(1.0, computing), total)
    attended = _per_query_head(op.MatMul(_per_key_head(exponentials, heads), value), heads)
    out = op.Cast(op.Div(attended, divisor), to=dtype)
    if not terms.return_lse:
        return out, None
    lse = op.Where(nothing, number(float("-inf"), computing), op.Add(op.Log(divisor), maximum))
    return out, op.Cast(op.Squeeze(lse, [3]), to=ir.DataType.FLOAT)


def _weights(scores: Any, visible: Any | None, computing: Any) -> Any:
    """Softmax of finite scores; a row that sees nothing is the mean of everything, for `_blank` to clear.

    Half the time of the formula written out, which only -inf among the scores, sinks and the logsumexp need.
    """
    if visible is not None:
        scores = op.Where(visible, scores, number(MASKED_SCORE, computing))
    return op.Softmax(scores, axis=-1)


def _blank(out: Any, visible: Any | None, computing: Any) -> Any:
    """Zeros for the queries that see nothing."""
    if visible is None:
        return out
    sees_something = op.ReduceMax(_int32(visible), [-1], keepdims=1)
    return op.Where(op.Cast(sees_something, to=ir.DataType.BOOL), out, number(0.0, computing))


def _per_key_head(x: Any, heads: tuple[int, int]) -> Any:
    """[B, Hq, S, N] -> [B, Hkv, Hq / Hkv * S, N]: the query heads of one key head together: no key is
    repeated.
    """
    return x if heads[0] == heads[1] else op.Reshape(x, vector(0, heads[1], -1, 0), allowzero=0)


def _per_query_head(x: Any, heads: tuple[int, int]) -> Any:
    """The inverse of `_per_key_head`."""
    return x if heads[0] == heads[1] else op.Reshape(x, vector(0, heads[0], -1, 0), allowzero=0)
