"""Each operation against the PyTorch it replaces, at BERT-base's shapes: batch 8 x 128, 12 heads of 64."""

from __future__ import annotations

import math
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


def test_attention_t5_bias(versus: Any, randn: Callable[..., torch.Tensor], device: str) -> None:
    """T5's relative bias from its table; the reference is given the dense bias, made beforehand."""
    query, key, value = (randn(BATCH.batch, BATCH.seq, HEADS, 64).transpose(1, 2) for _ in range(3))
    relative = ops.RelativeBias(randn(32, HEADS), "t5", 128)
    position = torch.arange(BATCH.seq)
    distance = position - position[:, None]
    buckets = _t5_buckets(distance).to(device)
    bias = relative.table[buckets].permute(2, 0, 1)[None]
    versus(
        "attention, T5 bias",
        lambda: functional.scaled_dot_product_attention(query, key, value, attn_mask=bias),
        lambda: ops.attention(query, key, value, relative_bias=relative),
    )


def _t5_buckets(distance: torch.Tensor) -> torch.Tensor:
    """Bucket of key position less query position, 32 buckets to a distance of 128 (Raffel et al., 2020)."""
    away = distance.abs()
    far = 8 + (torch.log(away.clamp(min=1) / 8) / math.log(128 / 8) * 8).clamp(min=0).long()
    return 16 * (distance > 0).long() + torch.where(away < 8, away, far.clamp(max=15))


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
def test_decode_attention(versus: Any, randn: Callable[..., torch.Tensor], device: str, layout: str) -> None:
    """One new token over 1,024 cached ones, 12 query heads on 4 of the cache."""
    size, block = 1024, 16
    query = randn(BATCH.batch, HEADS, 1, 64)
    key, value = (randn(BATCH.batch, 4, size, 64) for _ in range(2))
    lengths = torch.full((BATCH.batch,), size, dtype=torch.int32, device=device)
    caches, table = [key, value], None
    if layout == "paged":
        count = size // block
        table = torch.arange(BATCH.batch * count, dtype=torch.int32, device=device).view(BATCH.batch, count)
        caches = [
            x.view(BATCH.batch, 4, count, block, 64).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()
            for x in (key, value)
        ]
    versus(
        f"decode_attention, {layout}",
        lambda: functional.scaled_dot_product_attention(query, key, value, enable_gqa=True),
        lambda: ops.decode_attention(query, *caches, lengths, table),
    )


def test_layer_norm(versus: Any, randn: Callable[..., torch.Tensor]) -> None:
    x, weight, bias = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(HIDDEN), randn(HIDDEN)
    versus(
        "layer_norm",
        lambda: functional.layer_norm(x, (HIDDEN,), weight, bias, 1e-12),
        lambda: ops.layer_norm(x, weight, bias, eps=1e-12),
    )


def test_rms_norm(versus: Any, randn: Callable[..., torch.Tensor]) -> None:
    x, weight = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(HIDDEN)
    versus(
        "rms_norm",
        lambda: functional.rms_norm(x, (HIDDEN,), weight, 1e-6),
        lambda: ops.rms_norm(x, weight, eps=1e-6),
    )


def test_add_rms_norm(versus: Any, randn: Callable[..., torch.Tensor]) -> None:
    x, residual = randn(BATCH.batch, BATCH.seq, HIDDEN), randn(BATCH.batch, BATCH.seq, HIDDEN)
    weight = randn(HIDDEN)
    versus(
        "add_rms_norm",
        lambda: functional.rms_norm(x + residual, (HIDDEN,), weight, 1e-6),
        lambda: ops.add_rms_norm(x, residual, weight, 1e-6)[0],
    )


def test_softmax(versus: Any, randn: Callable[..., torch.Tensor], mask: torch.Tensor) -> None:
    x, keep = randn(BATCH.batch, HEADS, BATCH.seq, BATCH.seq), mask[:, None, None]
    versus(
        "softmax, padding mask",
        lambda: torch.softmax((0.125 * x).masked_fill(~keep, float("-inf")), -1),
        lambda: ops.softmax(x, keep, scale=0.125),
    )


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation(versus: Any, randn: Callable[..., torch.Tensor], kind: str) -> None:
    """Both halves of one projection's output."""
    gate, up = randn(BATCH.batch, BATCH.seq, 2 * FFN).chunk(2, -1)
    activations = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    }
    versus(
        f"gated_activation, {kind}",
        lambda: activations[kind](gate) * up,
        lambda: ops.gated_activation(gate, up, kind=kind),
    )


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
def test_rotary(versus: Any, randn: Callable[..., torch.Tensor], interleaved: bool) -> None:
    query, key = (randn(BATCH.batch, BATCH.seq, heads, 64).transpose(1, 2) for heads in (HEADS, 4))
    angles = randn(BATCH.seq, 32)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: torch.Tensor) -> torch.Tensor:
        if interleaved:
            return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
        return torch.cat([-x[..., 32:], x[..., :32]], -1)

    versus(
        f"rotary, {'interleaved' if interleaved else 'half'}",
        lambda: [x * cos + turned(x) * sin for x in (query, key)],
        lambda: list(ops.rotary(query, key, cos, sin, interleaved=interleaved)),
    )


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
