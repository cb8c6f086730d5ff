"""ONNX subgraph of attention over a cache, contiguous or paged, in float or quantized."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.dense_attention import plain_attention
from fastattn.onnx.graph import computing_dtype, number, vector
from fastattn.onnx.score_terms import unless_unbounded
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.decode_cache import DecodeCache

__all__ = ["attend_cache"]


def attend_cache(query: Any, cache: DecodeCache, terms: AttentionTerms) -> tuple[Any, Any | None]:
    """The plain formula over as much of the cache as its longest sequence fills.

    Args:
        query: [B, Hq, Sq, D].
        cache, terms: the other arguments of `fastattn::decode_attention`, tensors as graph values.

    Returns:
        [B, Hq, Sq, Dv] and float32 lse [B, Hq, Sq], None where not asked for.
    """
    computing = computing_dtype(query.dtype)
    lengths = op.Cast(cache.cache_lengths, to=ir.DataType.INT64)
    starts = op.Sub(lengths, op.Shape(query, start=2, end=3))
    # At least 1: ONNX Runtime cannot reduce over no keys.
    longest = op.ReduceMax(op.Concat(lengths, vector(1), axis=0), keepdims=1)
    key, value = (
        _rows(tensor, scale, cache, longest, computing)
        for tensor, scale in ((cache.key_cache, cache.key_scale), (cache.value_cache, cache.value_scale))
    )
    left = terms.window_left
    if not isinstance(left, int) or left >= 0:
        # Rows before every window may hold anything, as those past the length may.
        numbers = op.Range(0, op.Squeeze(longest, vector(0)), 1)
        first = op.Sub(op.Unsqueeze(starts, vector(1)), left)
        kept = unless_unbounded(left, op.GreaterOrEqual(numbers, first))
        kept = op.Unsqueeze(kept, vector(1, 3))
        key, value = (op.Where(kept, x, number(0.0, computing)) for x in (key, value))
    terms = replace(terms, causal=True, key_lengths=lengths, query_starts=starts)
    key_heads = cache.key_cache.shape[1 if cache.block_table is None else 2]
    return plain_attention(query, key, value, terms, heads=(query.shape[1], key_heads), dtype=query.dtype)


def _rows(tensor: Any, scale: Any | None, cache: DecodeCache, longest: Any, computing: Any) -> Any:
    """The first `longest` rows of each sequence in floats, [B, Hkv, longest, D]."""
    # Of float8, ONNX can only be told to make something else.
    stored = op.Cast(tensor, to=computing) if tensor.dtype == ir.DataType.FLOAT8E4M3FN else tensor
    if cache.block_table is not None:
        stored = _pages(stored, cache.block_table, longest)
        stored = op.Reshape(stored, vector(0, tensor.shape[2], -1, tensor.shape[3]))
    rows = op.Cast(op.Slice(stored, vector(0), longest, vector(2)), to=computing)
    return (
        rows if scale is None else op.Mul(rows, op.Cast(op.Reshape(scale, vector(1, -1, 1, 1)), to=computing))
    )


def _pages(stored: Any, table: Any, longest: Any) -> Any:
    """The pages that hold the first `longest` rows, [B, Hkv, pages, block_size, D]."""
    size = op.Shape(stored, start=1, end=2)
    used = op.Div(op.Add(longest, op.Sub(size, vector(1))), size)
    table = op.Slice(op.Cast(table, to=ir.DataType.INT64), vector(0), used, vector(1))
    # Entries of the table that no key uses may be anything: they are followed to some page that exists.
    last = op.Sub(op.Shape(stored, start=0, end=1), vector(1))
    pages = op.Gather(stored, op.Min(op.Max(table, vector(0)), last), axis=0)
    return op.Transpose(pages, perm=[0, 3, 1, 2, 4])
