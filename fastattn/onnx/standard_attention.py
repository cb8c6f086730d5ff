"""ONNX subgraphs of attention by ai.onnx's own operator, Attention of opset 23.

It is given every term as a mask. Its `is_causal` counts from the first key, or from the end of the past where
that is an input; and hidden keys cost the same either way: twice the time of none (ONNX Runtime 1.31, 128
tokens).
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.graph import emit, number, vector
from fastattn.onnx.score_terms import Positions, position_bias, present_keys, visible_keys
from fastattn.ops.attention_terms import AttentionTerms

__all__ = ["standard_attention", "within_standard_operator"]

# Added to the score of a hidden key where there are other things to add.
_HIDDEN = {ir.DataType.FLOAT: -3.0e38, ir.DataType.FLOAT16: -6.0e4}


def within_standard_operator(terms: AttentionTerms) -> bool:
    """Whether Attention computes this: all but a bias of the caller's, whose -inf could hide a whole row,
    sinks and the logsumexp. ONNX Runtime's takes no scale of 0 or below.
    """
    return terms.bias is None and terms.sinks is None and not terms.return_lse and terms.scale > 0.0


def standard_attention(
    query: Any,
    key: Any,
    value: Any,
    terms: AttentionTerms,
    *,
    heads: tuple[int, int],
    dtype: Any,
    positions: Positions | None = None,
    length_major: bool = False,
) -> Any:
    """Attention over [B, Hq, Sq, D], [B, Hkv, Sk, D] and [B, Hkv, Sk, Dv], at least one query and one key.

    Args:
        terms: the other arguments, `within_standard_operator`, tensors as graph values; of a mask the shape
            must be known.
        heads: Hq and Hkv.
        dtype: of all three, float32 or float16.
        positions: of queries and keys; default from the shapes of `query` and `key`. Layers given equal ones
            share one mask.
        length_major: query, key and value are [B, S, H * D], as a product leaves them, and so is the result;
            the mask, if any, is the same for all heads.

    Returns:
        [B, Hq, Sq, Dv], or [B, Sq, Hq * Dv]; zeros for a query that sees nothing, for which the operator's
        definition has a NaN.
    """
    if positions is None:
        axis = 1 if length_major else 2
        queries, keys = (op.Shape(x, start=axis, end=axis + 1) for x in (query, key))
        positions = Positions(queries, keys, terms)
    present = present_keys(terms, positions)
    if present is not None:
        # What lies past the length may be NaN: it must not enter a product.
        kept = op.Unsqueeze(present, vector(2) if length_major else vector(1, 3))
        key, value = (op.Where(kept, x, number(0.0, dtype)) for x in (key, value))
    visible = visible_keys(terms, positions, present)
    attributes: dict[str, Any] = {"scale": terms.scale}
    if terms.softcap > 0.0:
        attributes["softcap"] = terms.softcap
    if length_major:
        attributes["q_num_heads"], attributes["kv_num_heads"] = heads
    mask = _mask(visible, position_bias(terms, positions, dtype), positions, dtype)
    out = emit("Attention", [query, key, value, mask], **attributes)
    if visible is None:
        return out
    sees_something = op.ReduceMax(op.Cast(visible, to=ir.DataType.INT32), [-1], keepdims=1)
    sees_something = op.Cast(sees_something, to=ir.DataType.BOOL)
    if length_major:
        sees_something = op.Squeeze(sees_something, vector(1))
    return op.Where(sees_something, out, number(0.0, dtype))


def _mask(visible: Any | None, bias: Any | None, positions: Positions, dtype: Any) -> Any | None:
    """What Attention takes for its mask: bool, or floats to add; None where nothing is hidden or added."""
    if bias is not None:
        return bias if visible is None else op.Where(visible, bias, number(_HIDDEN[dtype], dtype))
    if visible is None:
        return None
    # ONNX Runtime takes a mask for all heads or sequences at once, but not one for all queries at once.
    rows = op.Concat(vector(1, 1), positions.queries, vector(1), axis=0)
    return op.Expand(visible, rows)
