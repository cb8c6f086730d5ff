"""ONNX faces of the attention operations: which subgraph serves which arguments."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from fastattn.onnx.cache_attention import attend_cache
from fastattn.onnx.cached_attention import appended, attend_appended, serves
from fastattn.onnx.dense_attention import (
    fused_attention,
    operator_attention,
    plain_attention,
    within_fused_operator,
)
from fastattn.onnx.graph import FUSED_DTYPES, arguments_by_name
from fastattn.onnx.packed_attention import attend_by_key_lengths, attend_each_sequence, attend_padded
from fastattn.onnx.standard_attention import within_standard_operator
from fastattn.onnx.targets import current_target
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.decode_cache import DecodeCache

__all__ = ["attention", "decode_attention", "varlen_attention"]


def attention(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
    """`fastattn::attention`: the target's fused operator where that computes it, plain ONNX for all else.

    MultiHeadAttention serves a padding mask or none, and as many key as query heads; ai.onnx's Attention any.
    """
    named = arguments_by_name(torch.ops.fastattn.attention.default, (query, key, value, *rest))
    del named["query"], named["key"], named["value"]
    terms = AttentionTerms(**named)
    past_key, past_value = appended(key), appended(value)
    if past_key is not None and past_value is not None:
        heads, dims = (query.shape[1], key.shape[1]), (key.shape[3], value.shape[3])
        if serves(heads, dims, query.dtype, terms):
            return attend_appended(query, past_key, past_value, terms), _no_lse()
    mask: Any = terms.mask
    heads = (query.shape[1], key.shape[1])
    standard = not current_target().contrib
    if standard and within_standard_operator(terms) and query.dtype in FUSED_DTYPES:
        return operator_attention(query, key, value, terms), _no_lse()
    same_heads = heads[0] == heads[1]
    fused = not standard and within_fused_operator(terms) and same_heads and query.dtype in FUSED_DTYPES
    if mask is not None and len(mask.shape) == 4:
        if mask.shape[1] == mask.shape[2] == 1 and mask.shape[0] == query.shape[0]:
            mask = op.Squeeze(mask, [1, 2]) if fused else mask
        else:
            fused = False
    if fused:
        return fused_attention(query, key, value, mask, terms), _no_lse()
    out, lse = plain_attention(query, key, value, terms, heads=heads, dtype=query.dtype)
    return out, _no_lse() if lse is None else lse


def varlen_attention(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
    """`fastattn::varlen_attention` by the target's fused operator; padded and plain where that cannot serve.

    A loop over the sequences, on a GPU padded sequences under key lengths.
    """
    named = arguments_by_name(torch.ops.fastattn.varlen_attention.default, (query, key, value, *rest))
    del named["query"], named["key"], named["value"], named["max_seqlen_q"], named["max_seqlen_k"]
    bounds_q, bounds_k = named.pop("cu_seqlens_q"), named.pop("cu_seqlens_k")
    default_start = named.pop("default_start")
    terms = AttentionTerms(**named)
    arguments = (query, key, value, bounds_q, bounds_k, terms, default_start)
    if current_target().contrib:
        fused = within_fused_operator(terms) and query.shape[1] == key.shape[1]
    else:
        fused = within_standard_operator(terms)
    if fused and query.dtype in FUSED_DTYPES:
        attend = attend_each_sequence if current_target().loops else attend_by_key_lengths
        return attend(*arguments), _no_lse()
    out, lse = attend_padded(*arguments)
    return out, _no_lse() if lse is None else lse


def decode_attention(query: Any, *rest: Any) -> tuple[Any, Any]:
    """`fastattn::decode_attention` in plain ONNX: ONNX Runtime's own operators append to the cache."""
    named = arguments_by_name(torch.ops.fastattn.decode_attention.default, (query, *rest))
    del named["query"]
    cache = DecodeCache(**{field.name: named.pop(field.name) for field in fields(DecodeCache)})
    out, lse = attend_cache(query, cache, AttentionTerms(**named))
    return out, _no_lse() if lse is None else lse


def _no_lse() -> Any:
    return op.Constant(value=ir.tensor([], dtype=ir.DataType.FLOAT))
