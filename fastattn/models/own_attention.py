"""Attention of layers that do not ask transformers' interface for it, under the masks their models make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn import ops

__all__ = ["attend"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scale: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    **terms: Any,
) -> Tensor:
    """Attention with the heads joined.

    Args:
        query, key, value: [B, Hq, Sq, D] and [B, Hkv, Sk, D].
        attention_mask: 4-D, broadcastable to [B, Hq, Sq, Sk]: bool, True = attend, or added to the scores.
        scale: of the scores.
        bias: likewise broadcastable, added to the scaled scores.
        dropout_p: of the attention weights, as it is to be applied now.
        terms: further arguments of `ops.attention`.

    Returns:
        [B, Sq, Hq * D].
    """
    mask = None
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    out = ops.attention(query, key, value, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, **terms)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(2)
