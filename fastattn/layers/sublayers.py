"""The parts of torch.nn's Transformer layers: attention and feed-forward, each added to the residual stream,
and the norms between them.

A sum is carried as (total, pending): on a GPU and in graphs what was added last waits for the norm that
follows, to be one operation with it; in PyTorch on a CPU it is added at once, in place on the product nobody
else has seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import linear, relu
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.layers.attention import MultiheadAttention
from fastattn.layers.fused import activated_linear, project
from fastattn.layers.onednn import onednn_linear
from fastattn.layers.plain import is_observed, is_plain
from fastattn.layers.quantized_linear import QuantizedLinear
from fastattn.layers.residual import add_norm
from fastattn.layers.visibility import Visibility
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["Pending", "add_attention", "add_feed_forward", "is_direct", "normalized", "settled"]

# What was added last and the probability of dropping its elements; None where the total is complete.
Pending = tuple[Tensor, float] | None


def is_direct(attention: nn.Module) -> bool:
    """Whether the attention layer may be computed in parts instead of called."""
    return type(attention) is MultiheadAttention and not is_observed(attention)


def add_attention(
    total: Tensor, attention: Any, x: Tensor, memory: Tensor, visibility: Visibility, dropout: nn.Module
) -> tuple[Tensor, Pending]:
    """`total + dropout(attention(x, memory, memory))`."""
    if not is_direct(attention):
        attended, _ = attention(
            x,
            memory,
            memory,
            attn_mask=visibility.attn_mask,
            key_padding_mask=visibility.key_padding_mask,
            need_weights=False,
            is_causal=visibility.is_causal,
        )
        return _add(total, attended, dropout)
    batch_first = attention.batch_first or visibility.packing is not None
    joined = attention.attended(x, memory, memory, visibility, batch_first)
    if type(attention.out_proj) is NonDynamicallyQuantizableLinear or is_plain(
        attention.out_proj, QuantizedLinear
    ):
        return _add_product(total, joined, attention.out_proj, dropout)
    return _add(total, attention.output(joined), dropout)


def add_feed_forward(
    total: Tensor,
    x: Tensor,
    first: nn.Module,
    activation: Callable[[Tensor], Tensor],
    inner_dropout: nn.Module,
    second: nn.Module,
    dropout: nn.Module,
) -> tuple[Tensor, Pending]:
    """`total + dropout(second(inner_dropout(activation(first(x)))))`."""
    hidden: Tensor = inner_dropout(_activated(x, first, activation))
    if is_plain(second, nn.Linear) or is_plain(second, QuantizedLinear):
        return _add_product(total, hidden, second, dropout)  # type: ignore[arg-type]
    return _add(total, second(hidden), dropout)


def normalized(norm: nn.Module, total: Tensor, pending: Pending) -> tuple[Tensor, Tensor]:
    """`norm(total + pending)` and that sum."""
    if pending is None:
        return norm(total), total
    added, dropout_p = pending
    return add_norm(norm, added, total, dropout_p)


def settled(total: Tensor, pending: Pending) -> Tensor:
    """`total + pending`."""
    if pending is None:
        return total
    added, dropout_p = pending
    return total + (drop(added, dropout_p) if dropout_p else added)


def _activated(x: Tensor, dense: nn.Module, activation: Callable[[Tensor], Tensor]) -> Tensor:
    if activation is not relu and not is_plain(activation, nn.ReLU):
        return activated_linear(x, dense, activation)
    if is_plain(dense, QuantizedLinear):
        quantized: Tensor = dense(x, "relu")
        return quantized
    (product,) = project(x, [dense])
    if is_plain(dense, nn.Linear) and not product.requires_grad and runs_in_pytorch(product):
        return product.relu_()
    return relu(product)


def _add(total: Tensor, added: Tensor, dropout: nn.Module) -> tuple[Tensor, Pending]:
    dropout_p = 0.0
    if is_plain(dropout, nn.Dropout):
        dropout_p = dropout.p if dropout.training else 0.0  # type: ignore[assignment]
    else:
        added = dropout(added)
    if runs_in_pytorch(total):
        return settled(total, (added, dropout_p)), None
    return total, (added, dropout_p)


def _add_product(total: Tensor, x: Tensor, dense: nn.Linear, dropout: nn.Module) -> tuple[Tensor, Pending]:
    """`total + dropout(dense(x))`, with `dense` read where its weight is not quantized."""
    drops = not is_plain(dropout, nn.Dropout) or (dropout.training and dropout.p)
    if drops or not runs_in_pytorch(x):
        return _add(total, _product(x, dense), dropout)
    fused = None if isinstance(dense, QuantizedLinear) else onednn_linear(x, dense, residual=total)
    if fused is not None:
        return fused, None
    product = _product(x, dense)
    if product.dtype != total.dtype or (
        torch.is_grad_enabled() and (product.requires_grad or total.requires_grad)
    ):
        return total + product, None
    return product.add_(total), None


def _product(x: Tensor, dense: nn.Linear) -> Tensor:
    if isinstance(dense, QuantizedLinear):
        called: Tensor = dense(x)
        return called
    return linear(x, dense.weight, dense.bias)
