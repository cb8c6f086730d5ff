"""Decode attention in plain PyTorch: the reference, differentiable, exact in float64, and the CPU's path."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastattn.ops.attention_cpu import attention_torch
from fastattn.ops.attention_reference import attention_reference, computing_dtype
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.decode_cache import DecodeCache

__all__ = ["decode_attention_reference", "decode_attention_torch"]


def decode_attention_reference(
    query: Tensor, cache: DecodeCache, terms: AttentionTerms
) -> tuple[Tensor, Tensor]:
    """`fastattn::decode_attention` on the same arguments: all sequences at once over all the cache can hold.

    Returns:
        out [B, Hq, Sq, Dv] in query's dtype, and lse [B, Hq, Sq] in the computing dtype (empty unless asked
        for).
    """
    dtype = computing_dtype(query)
    starts = cache.cache_lengths - query.shape[2]
    key, value = cache.read(slice(None), (0, cache.capacity), dtype)
    if terms.window_left >= 0:
        # Rows before every window may hold anything, as those past the length may.
        gone = torch.arange(cache.capacity, device=query.device) < starts[:, None] - terms.window_left
        key, value = (x.masked_fill(gone[:, None, :, None], 0.0) for x in (key, value))
    terms = replace(terms, causal=True, key_lengths=cache.cache_lengths, query_starts=starts)
    out, lse = attention_reference(query.to(dtype), key, value, terms)
    return out.to(query.dtype), lse


def decode_attention_torch(
    query: Tensor, cache: DecodeCache, terms: AttentionTerms
) -> tuple[Tensor, Tensor | None]:
    """`fastattn::decode_attention` by PyTorch's fused kernels, over the keys each sequence has and sees.

    Sequences of one length are attended in one call, others one by one. Quantized caches are computed in
    float32: their keys times the scales would be rounded once more in query's dtype.
    """
    queries = query.shape[2]
    lengths = cache.cache_lengths.clamp(0, cache.capacity).tolist()
    parts = [(slice(index, index + 1), length) for index, length in enumerate(lengths)]
    if len(set(lengths)) == 1:
        parts = [(slice(None), lengths[0])]
    dtype = computing_dtype(query) if cache.quantized else None
    outs, normalizers = [], []
    for batch, length in parts:
        first = max(0, length - queries - terms.window_left) if terms.window_left >= 0 else 0
        key, value = cache.read(batch, (first, length), dtype)
        out, lse = attention_torch(
            query[batch] if dtype is None else query[batch].to(dtype),
            key,
            value,
            replace(terms, causal=True, query_start=length - queries - first),
        )
        outs.append(out.to(query.dtype))
        normalizers.append(lse)
    if not outs:
        empty = query.new_zeros(*query.shape[:3], cache.value_cache.shape[3])
        return empty, query.new_zeros(query.shape[:3], dtype=torch.float32) if terms.return_lse else None
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    if not terms.return_lse:
        return out, None
    return out, torch.cat([lse for lse in normalizers if lse is not None])
