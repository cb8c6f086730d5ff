"""Each operation against the PyTorch it replaces, at BERT-base's shapes: batch 8 x 128, 12 heads of 64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from fastattn import ops
from fastattn.bench import Workload

BATCH = Workload(batch=8, seq=128, fill=0.47)
HIDDEN, HEADS, FFN = 768, 12, 3072


@pytest.fixture
def randn(device: str) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device)


@pytest.fixture
def mask(device: str) -> torch.Tensor:
    """[B, S], true where a position is real."""
    return BATCH.tokens(1000)["attention_mask"].bool().to(device)


def test_attention(versus: Any, randn: Callable[..., torch.Tensor], mask: torch.Tensor) -> None:
    query, key, value = (randn(BATCH.batch, BATCH.seq, HEADS, 64).transpose(1, 2) for _ in range(3))
    versus(
        "attention, padding mask",
        lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None]),
        lambda: ops.attention(query, key, value, mask=mask),
    )


def test_varlen_attention(versus: Any, randn: Callable[..., torch.Tensor], mask: torch.Tensor) -> None:
    """The same attention over real tokens alone; the reference computes the padding too."""
    query, key, value = (randn(BATCH.batch, BATCH.seq, HEADS, 64).transpose(1, 2) for _ in range(3))
    packed = [x.transpose(1, 2)[mask] for x in (query, key, value)]
    bounds = functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()

    def unpadded() -> torch.Tensor:
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return out.transpose(1, 2)[mask]

    versus(
        "varlen_attention, 47% fill",
        unpadded,
        lambda: ops.varlen_attention(*packed, bounds, bounds, BATCH.seq, BATCH.seq),
    )


def test_add_layer_norm(versus: Any, randn: Callable[..., torch.Tensor]) -> None:
    x, residual = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(BATCH.batch, BATCH.seq, HIDDEN)
    weight, bias = randn(HIDDEN), randn(HIDDEN)
    versus(
        "add_layer_norm",
        lambda: functional.layer_norm(x + residual, (HIDDEN,), weight, bias, 1e-12),
        lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-12)[0],
    )


def test_bias_gelu(versus: Any, randn: Callable[..., torch.Tensor]) -> None:
    x, bias = randn(BATCH.batch, BATCH.seq, FFN), randn(FFN)
    versus("bias_gelu", lambda: functional.gelu(x + bias), lambda: ops.bias_gelu(x, bias))


def test_packed_linear(versus: Any, randn: Callable[..., torch.Tensor]) -> None:
    """Query, key and value projections, as parameters of a model lie in memory: each on its own."""
    x = randn(BATCH.batch, BATCH.seq, HIDDEN)
    weights, biases = [randn(HIDDEN, HIDDEN) for _ in range(3)], [randn(HIDDEN) for _ in range(3)]
    versus(
        "packed_linear, QKV",
        lambda: [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)],
        lambda: ops.packed_linear(x, weights, biases),
        budget_s=2.0,
    )
