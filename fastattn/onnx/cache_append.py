"""The operation that stands for a cache's growth in a decoder's trace; `cached_attention` translates it."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append"]


@torch.library.custom_op("fastattn_graph::append", mutates_args=())
def append(past: Tensor, new: Tensor, attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """The keys (or values) of all positions: those of the past and, behind them, the new.

    How many there are is the attention mask's length alone. With a plain concatenation torch.export would
    compute it from the length of the past, which is longer where a buffer is shared by past and present.

    Args:
        past: [B, H, P, D], of which the first T - S rows count.
        new: [B, H, S, D].
        attention_mask: [B, T].
        tokens: [B, S].

    Returns:
        [B, H, T, D].
    """
    there = attention_mask.shape[1] - tokens.shape[1]
    return torch.cat((past[:, :, :there], new), dim=2)


@append.register_fake
def _(past: Tensor, new: Tensor, attention_mask: Tensor, tokens: Tensor) -> Tensor:
    return new.new_empty(new.shape[0], new.shape[1], attention_mask.shape[1], new.shape[3])
