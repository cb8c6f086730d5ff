"""Attention by PyTorch's fused CPU kernels, arranged so that their semantics are ours.

Where they cannot serve (dropout, logsumexp, value heads of another size), the reference computes the result.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastattn.ops.attention_reference import (
    attention_reference,
    query_tiles,
    varlen_attention_reference,
    visible_keys,
)

__all__ = ["attend_sequences", "attention_torch", "varlen_attention_torch"]


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """SDPA on [B, H, S, D]; `mask` bool or additive, `causal` aligned top-left."""
    if query.shape[2] == 0 or key.shape[2] == 0 or query.shape[0] == 0:
        # The CPU kernel divides by the number of queries: an empty call ends the process.
        return query.new_zeros(*query.shape[:3], value.shape[3])
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    query_start: int,
    query_starts: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn::attention` in PyTorch; shapes as in `fastattn.ops.attention`."""
    if dropout_p > 0.0 or return_lse or query.shape[3] != value.shape[3]:
        out, lse = attention_reference(
            query,
            key,
            value,
            mask,
            bias,
            key_lengths,
            causal,
            query_start,
            query_starts,
            scale,
            dropout_p,
            seed,
            return_lse,
        )
        return out, lse.to(torch.float32) if return_lse else None
    query, key, value = map(_last_dim_contiguous, (query, key, value))
    if key_lengths is not None:
        # Slicing, not masking: whatever a cache holds past the length (NaN too) never enters a product.
        lengths = key_lengths.clamp(0, key.shape[2]).tolist()
        parts = [(slice(None), lengths[0])] if len(set(lengths)) == 1 else list(_one_by_one(lengths))
        outs = [
            _visible_attention(
                query[batch],
                key[batch, :, :length],
                value[batch, :, :length],
                _narrow(mask, batch, length),
                _narrow(bias, batch, length),
                causal,
                query_start,
                query_starts if query_starts is None else query_starts[batch],
                scale,
            )
            for batch, length in parts
        ]
        return (torch.cat(outs) if outs else torch.zeros_like(query)), None
    return _visible_attention(query, key, value, mask, bias, causal, query_start, query_starts, scale), None


def _one_by_one(lengths: list[int]) -> list[tuple[slice, int]]:
    return [(slice(index, index + 1), length) for index, length in enumerate(lengths)]


def _narrow(x: Tensor | None, batch: slice, length: int) -> Tensor | None:
    """The part of a mask or bias that belongs to `batch` and the first `length` keys."""
    if x is None:
        return None
    x = x if x.shape[0] == 1 else x[batch]
    return x if x.shape[-1] == 1 else x[..., :length]


def _visible_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    query_start: int,
    query_starts: Tensor | None,
    scale: float,
) -> Tensor:
    length, keys = query.shape[2], key.shape[2]
    if causal and query_starts is None and query_start >= keys - 1:
        causal = False
    if mask is None and bias is None and not causal:
        return _fused(query, key, value, None, False, scale)
    if mask is None and bias is None and query_starts is None and query_start == 0 and length == keys:
        return _fused(query, key, value, None, True, scale)
    outs = []
    for rows in query_tiles(query, key):
        visible = visible_keys(rows, keys, key.device, mask, None, causal, query_start, query_starts)
        additive = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows[0] : rows[1]]
        if additive is not None:
            additive = additive.to(query.dtype)
            if visible is not None:
                additive = additive.masked_fill(~visible, float("-inf"))
        outs.append(
            _fused(
                query[:, :, rows[0] : rows[1]],
                key,
                value,
                visible if additive is None else additive,
                False,
                scale,
            )
        )
    if len(outs) == 1:
        return outs[0]
    return torch.cat(outs, dim=2) if outs else torch.zeros_like(query)


def varlen_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    query_start: int,
    query_starts: Tensor | None,
    default_start: bool,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    return_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn::varlen_attention` in PyTorch: one fused call a sequence, nothing padded."""
    if dropout_p > 0.0 or return_lse or query.shape[2] != value.shape[2]:
        out, lse = varlen_attention_reference(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            query_start,
            query_starts,
            default_start,
            scale,
            dropout_p,
            seed,
            return_lse,
        )
        return out, lse.to(torch.float32) if return_lse else None
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    starts = None
    if causal and query_starts is not None:
        starts = query_starts.tolist()
    elif causal and not default_start:
        starts = [query_start] * (len(bounds_q) - 1)
    out = attend_sequences(query, key, value, bounds_q, bounds_k, scale, causal, starts)
    return out, None


def attend_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    scale: float,
    causal: bool = False,
    starts: list[int] | None = None,
) -> Tensor:
    """Packed attention [T, H, D] with the bounds of the sequences as plain numbers: one fused call a
    sequence.

    `starts`: the position of each sequence's query 0 among its keys where `causal`; default the last keys'.
    """
    q, k, v = (_last_dim_contiguous(x).transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    outs = []
    for sequence, (q0, q1) in enumerate(pairwise(bounds_q)):
        k0, k1 = bounds_k[sequence], bounds_k[sequence + 1]
        start = k1 - k0 - (q1 - q0) if starts is None else starts[sequence]
        result = _visible_attention(
            q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], None, None, causal, start, None, scale
        )
        outs.append(result[0].transpose(0, 1))
    return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[2])
