"""ONNX faces of the attention operations: which subgraph serves which arguments."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from fastattn.onnx.cache_attention import attend_cache
from fastattn.onnx.dense_attention import fused_attention, plain_attention, within_fused_operator
from fastattn.onnx.graph import FUSED_DTYPES, arguments_by_name
from fastattn.onnx.packed_attention import attend_each_sequence, attend_padded
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.decode_cache import DecodeCache

__all__ = ["attention", "decode_attention", "varlen_attention"]


def attention(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
    """`fastattn::attention`: MultiHeadAttention under a padding mask or none, plain ONNX for all else."""
    named = arguments_by_name(torch.ops.fastattn.attention.default, (query, key, value, *rest))
    del named["query"], named["key"], named["value"]
    terms = AttentionTerms(**named)
    mask: Any = terms.mask
    same_heads = query.shape[1] == key.shape[1]
    fused = within_fused_operator(terms) and same_heads and query.dtype in FUSED_DTYPES
    if mask is not None and len(mask.shape) == 4:
        if mask.shape[1] == mask.shape[2] == 1 and mask.shape[0] == query.shape[0]:
            mask = op.Squeeze(mask, [1, 2]) if fused else mask
        else:
            fused = False
    if fused:
        return fused_attention(query, key, value, mask, terms), _no_lse()
    heads = (query.shape[1], key.shape[1])
    out, lse = plain_attention(query, key, value, terms, heads=heads, dtype=query.dtype)
    return out, _no_lse() if lse is None else lse


def varlen_attention(query: Any, key: Any, value: Any, *rest: Any) -> tuple[Any, Any]:
    """`fastattn::varlen_attention`: a loop over the sequences; padded and plain where that cannot serve."""
    named = arguments_by_name(torch.ops.fastattn.varlen_attention.default, (query, key, value, *rest))
    del named["query"], named["key"], named["value"], named["max_seqlen_q"], named["max_seqlen_k"]
    bounds_q, bounds_k = named.pop("cu_seqlens_q"), named.pop("cu_seqlens_k")
    default_start = named.pop("default_start")
    terms = AttentionTerms(**named)
    same_heads = query.shape[1] == key.shape[1]
    arguments = (query, key, value, bounds_q, bounds_k, terms, default_start)
    if within_fused_operator(terms) and same_heads and query.dtype in FUSED_DTYPES:
        return attend_each_sequence(*arguments), _no_lse()
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
