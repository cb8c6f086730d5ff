"""The operations' formulas in plain PyTorch, on any device, written apart from the library.

In float64 they are the truth, in the operation's dtype what PyTorch itself would get.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Relative:
    """A relative bias: its table [num_buckets, Hq], and how distances fall into buckets."""

    table: Tensor
    kind: str
    max_distance: int


def bucket(distance: Tensor, kind: str, buckets: int, max_distance: int) -> Tensor:
    """The bucket of key position less query position, as T5's and MPNet's authors compute it (on the CPU)."""
    away = -distance
    first = torch.zeros_like(away)
    if kind == "t5-causal":
        away = away.clamp(min=0)
    else:
        buckets //= 2
        # T5 puts keys after the query into the upper half, as MPNet does.
        first = (away < 0).long() * buckets
        away = away.abs()
    exact = buckets // 2
    logarithmic = torch.log(away.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    far = (exact + logarithmic.clamp(min=0).long()).clamp(max=buckets - 1)
    return first + torch.where(away < exact, away, far)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative: Relative | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = False,
    query_start: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out [B, Hq, Sq, Dv] and lse [B, Hq, Sq] of `ops.attention`'s arguments, in `dtype`, from all scores."""
    batch, heads, queries, size = query.shape
    keys, device = key.shape[2], query.device
    start = keys - queries if query_start is None else query_start
    starts = torch.as_tensor(start, device=device).expand(batch).long()
    position = (torch.arange(queries, device=device) + starts[:, None])[:, None, :, None]
    column = torch.arange(keys, device=device)
    visible = torch.ones(batch, 1, queries, keys, dtype=torch.bool, device=device)
    if mask is not None:
        visible = visible & (mask[:, None, None] if mask.dim() == 2 else mask)
    if key_lengths is not None:
        there = column < key_lengths[:, None]
        visible = visible & there[:, None, None]
        key, value = (torch.where(there[:, None, :, None], x, 0) for x in (key, value))
    left, right = window or (-1, -1)
    if causal:
        visible = visible & (column <= position)
    if left >= 0:
        visible = visible & (column >= position - left)
    if right >= 0:
        visible = visible & (column <= position + right)
    key, value = (x.repeat_interleave(heads // x.shape[1], 1).to(dtype) for x in (key, value))
    scores = query.to(dtype) @ key.transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if relative is not None:
        distance = (column - position[:, 0]).cpu()
        index = bucket(distance, relative.kind, len(relative.table), relative.max_distance).to(device)
        scores = scores + relative.table.to(dtype)[index].permute(0, 3, 1, 2)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * (column - position).abs().to(dtype)
    scores = scores.masked_fill(~visible, -math.inf)
    if sinks is not None:
        logits = sinks.to(dtype)[None, :, None, None].expand(batch, heads, queries, 1)
        scores = torch.cat([scores, logits], -1)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:3], -math.inf)
    empty = lse == -math.inf
    weights = torch.softmax(scores.masked_fill(empty[..., None], 0.0), -1).masked_fill(empty[..., None], 0.0)
    return weights[..., :keys] @ value, lse


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """Over the last dimension."""
    given = (None if each is None else each.to(dtype) for each in (weight, bias))
    return functional.layer_norm(x.to(dtype), x.shape[-1:], *given, eps)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float, dtype: torch.dtype) -> Tensor:
    """Over the last dimension, times weight + offset."""
    x = x.to(dtype)
    normalized = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normalized if weight is None else normalized * (weight.to(dtype) + offset)


def softmax(x: Tensor, mask: Tensor | None, scale: float, causal: bool, dtype: torch.dtype) -> Tensor:
    """Over the last dimension; rows that keep nothing are zero."""
    scores = x.to(dtype) * scale
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask.expand_as(x)
    if causal:
        rows, columns = x.shape[-2:]
        keep = keep & torch.ones(rows, columns, dtype=torch.bool, device=x.device).tril(columns - rows)
    weights = torch.softmax(scores.masked_fill(~keep, -math.inf), -1)
    return torch.where(keep.any(-1, keepdim=True), weights, 0.0)


def gated_activation(gate: Tensor, up: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """activation(gate) * up."""
    gate = gate.to(dtype)
    if kind == "silu":
        return functional.silu(gate) * up.to(dtype)
    return functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up.to(dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, dtype: torch.dtype) -> Tensor:
    """The first R of each head of [B, H, S, D] rotated by cos and sin [S, R] or [B, S, R]."""
    cos, sin = (each.to(dtype).unsqueeze(-3) for each in (cos, sin))
    size = cos.shape[-1]
    turned, rest = x[..., :size].to(dtype), x[..., size:].to(dtype)
    if interleaved:
        other = torch.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
    else:
        other = torch.cat([-turned[..., size // 2 :], turned[..., : size // 2]], -1)
    return torch.cat([turned * cos + other * sin, rest], -1)
