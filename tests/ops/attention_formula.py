"""The attention formula written down once more, sharing nothing with the implementation: the whole score
matrix, in any dtype. In float64 it is what results are compared with, in theirs PyTorch's own error.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.t5.modeling_t5 import T5Attention

__all__ = ["attention_formula", "transformers_buckets"]


def transformers_buckets(kind: str, distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance (key less query position), by transformers' own functions."""
    if kind == "mpnet":
        return MPNetEncoder.relative_position_bucket(distance, num_buckets, max_distance)
    return T5Attention._relative_position_bucket(distance, kind == "t5", num_buckets, max_distance)


def attention_formula(
    query,
    key,
    value,
    dtype,
    *,
    mask=None,
    bias=None,
    relative_bias=None,
    alibi_slopes=None,
    causal=False,
    query_start=None,
    key_lengths=None,
    window=None,
    scale=None,
    softcap=0.0,
    sinks=None,
) -> tuple[Tensor, Tensor]:
    """Output [B, Hq, Sq, Dv] and logsumexp [B, Hq, Sq] of `ops.attention` on these arguments, in `dtype`."""
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    start = torch.as_tensor(keys - queries if query_start is None else query_start).expand(batch)
    position = torch.arange(queries) + start[:, None]
    distance = torch.arange(keys) - position[:, :, None]  # [B, Sq, Sk]

    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    if mask is not None:
        visible &= mask[:, None, None, :] if mask.dim() == 2 else mask
    if causal:
        visible &= (distance <= 0)[:, None]
    left, right = window or (-1, -1)
    if left != -1:
        visible &= (distance >= -left)[:, None]
    if right != -1:
        visible &= (distance <= right)[:, None]
    if key_lengths is not None:
        present = torch.arange(keys) < key_lengths[:, None]
        visible &= present[:, None, None, :]
        key, value = (torch.where(present[:, None, :, None], x, 0.0) for x in (key, value))

    group = heads // key.shape[1]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (head_dim**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if relative_bias is not None:
        table = relative_bias.table.to(dtype)
        buckets = transformers_buckets(relative_bias.kind, distance, len(table), relative_bias.max_distance)
        scores = scores + table[buckets].permute(0, 3, 1, 2)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.abs().to(dtype)[:, None]
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(batch, heads, queries, 1)], -1)
    if scores.shape[-1] == 0:
        return value.new_zeros(*query.shape[:3], value.shape[3]), query.new_full(query.shape[:3], -torch.inf)
    weights = torch.softmax(scores, -1)[..., :keys].nan_to_num()
    return weights @ value, torch.logsumexp(scores, -1)
