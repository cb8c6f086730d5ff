"""Attention with soft-capped scores on a CPU, where no fused kernel of PyTorch's caps: the formula, in place.

Gemma 2, "Improving Open Language Models at a Practical Size" (2024), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention_terms import AttentionTerms

__all__ = ["can_soften_in_place", "softcapped_tile"]


def can_soften_in_place(query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> bool:
    """Whether `softcapped_tile` computes these terms: without a sink, and where nothing needs a gradient."""
    tensors = (query, key, value, terms.bias, terms.rel_table, terms.alibi_slopes)
    learned = any(x is not None and x.requires_grad for x in tensors)
    return terms.sinks is None and not (learned and torch.is_grad_enabled())


def softcapped_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    terms: AttentionTerms,
) -> Tensor:
    """The formula on one tile, in place on its scores; shapes as in `attend_tile`."""
    if torch.is_autocast_enabled(query.device.type):
        # Query, key and value have been through it.
        with torch.autocast(query.device.type, enabled=False):
            return softcapped_tile(query, key, value, rows, columns, terms)
    batch, heads, length, _ = query.shape
    # The query heads that share a key head, one after another as its queries.
    joined = query.reshape(batch, key.shape[1], -1, query.shape[3])
    scores = torch.matmul(joined, key.transpose(2, 3)).view(batch, heads, length, key.shape[2])
    scores = scores.mul_(terms.scale / terms.softcap).tanh_().mul_(terms.softcap)
    added = terms.added(rows, columns, query.device, query.dtype)
    if added is not None:
        scores += added
    visible = terms.visible(rows, columns, query.device)
    if visible is not None:
        scores.masked_fill_(~visible, float("-inf"))
    empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
    weights = torch.softmax(scores, dim=-1).masked_fill_(empty, 0.0)
    out = torch.matmul(weights.view(batch, key.shape[1], -1, key.shape[2]), value)
    return out.view(batch, heads, length, value.shape[3])
