"""The attentions against SDPA, each of its backends, FlexAttention and their formulas, at BERT-base's shapes:
batch 8 x 128, 12 heads of 64; fp32 on a CPU, bf16 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contenders import (
    BATCH,
    EAGER,
    FASTATTN,
    FLEX,
    HEADS,
    PYTORCH,
    REFERENCE,
    SDPA_BACKENDS,
    Randn,
    contenders,
    flex_attention,
    sdpa_backends,
)
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from fastattn.bench import MissingError
from fastattn.ops.attention_reference import attention_reference, varlen_attention_reference
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.decode_cache import DecodeCache
from fastattn.ops.decode_reference import decode_attention_reference

SCALE = 64**-0.5


def eager_attention(query: Tensor, key: Tensor, value: Tensor, added: Tensor) -> Tensor:
    return (torch.matmul(query, key.mT) * SCALE + added).softmax(-1) @ value


def hidden_by(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, 1, S], what is added to scores."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -math.inf)[
        :, None, None
    ]


def heads_of(randn: Randn) -> list[Tensor]:
    """Query, key and value [B, H, S, D] as models have them: views of [B, S, H, D]."""
    return [randn(BATCH.batch, BATCH.seq, HEADS, 64).transpose(1, 2) for _ in range(3)]


@contenders(PYTORCH, EAGER, *SDPA_BACKENDS, FLEX, REFERENCE, FASTATTN)
def test_attention(compared: Any, randn: Randn, mask: Tensor) -> None:
    tensors = heads_of(randn)
    keep, added = mask[:, None, None], hidden_by(mask, tensors[0].dtype)
    terms = AttentionTerms(mask=mask, scale=SCALE)

    compared(
        "attention, padding mask",
        {
            PYTORCH: lambda: functional.scaled_dot_product_attention(*tensors, attn_mask=keep),
            EAGER: lambda: eager_attention(*tensors, added),
            REFERENCE: lambda: attention_reference(*tensors, terms)[0],
            FASTATTN: lambda: ops.attention(*tensors, mask=mask),
        },
        {
            **sdpa_backends(tensors, attn_mask=keep),
            FLEX: flex_attention(tensors, lambda b, h, q, k: mask[b, k], per_batch=True),
        },
    )


@contenders(PYTORCH, EAGER, *SDPA_BACKENDS, FLEX, REFERENCE, FASTATTN)
def test_attention_causal(compared: Any, randn: Randn) -> None:
    """No mask to read: what every backend of SDPA takes."""
    tensors = heads_of(randn)
    future = torch.ones(BATCH.seq, BATCH.seq, dtype=torch.bool, device=tensors[0].device).triu(1)
    added = torch.zeros_like(future, dtype=tensors[0].dtype).masked_fill(future, -math.inf)
    terms = AttentionTerms(causal=True, scale=SCALE)

    compared(
        "attention, causal",
        {
            PYTORCH: lambda: functional.scaled_dot_product_attention(*tensors, is_causal=True),
            EAGER: lambda: eager_attention(*tensors, added),
            REFERENCE: lambda: attention_reference(*tensors, terms)[0],
            FASTATTN: lambda: ops.attention(*tensors, causal=True),
        },
        {**sdpa_backends(tensors, is_causal=True), FLEX: flex_attention(tensors, lambda b, h, q, k: q >= k)},
    )


@contenders(PYTORCH, EAGER, *SDPA_BACKENDS, REFERENCE, FASTATTN)
def test_relative_bias(compared: Any, randn: Randn, device: str) -> None:
    """Attention with T5's relative bias from its table; the others are given the dense bias, made
    beforehand.
    """
    tensors = heads_of(randn)
    relative = ops.RelativeBias(randn(32, HEADS), "t5", 128)
    position = torch.arange(BATCH.seq)
    distance = position - position[:, None]
    bias = relative.table[_t5_buckets(distance).to(device)].permute(2, 0, 1)[None].contiguous()
    terms = AttentionTerms(rel_table=relative.table, rel_kind="t5", rel_max_distance=128, scale=SCALE)
    compared(
        "attention, T5 bias",
        {
            PYTORCH: lambda: functional.scaled_dot_product_attention(*tensors, attn_mask=bias),
            EAGER: lambda: eager_attention(*tensors, bias),
            REFERENCE: lambda: attention_reference(*tensors, terms)[0],
            FASTATTN: lambda: ops.attention(*tensors, relative_bias=relative),
        },
        sdpa_backends(tensors, attn_mask=bias),
    )


def _t5_buckets(distance: Tensor) -> Tensor:
    """Bucket of key position less query position, 32 buckets to a distance of 128 (Raffel et al., 2020)."""
    away = distance.abs()
    far = 8 + (torch.log(away.clamp(min=1) / 8) / math.log(128 / 8) * 8).clamp(min=0).long()
    return 16 * (distance > 0).long() + torch.where(away < 8, away, far.clamp(max=15))


@contenders(PYTORCH, "PyTorch varlen_attn", REFERENCE, FASTATTN)
def test_varlen_attention(compared: Any, randn: Randn, mask: Tensor) -> None:
    """Attention over real tokens alone; PyTorch's row computes the padding too."""
    tensors = heads_of(randn)
    packed = [x.transpose(1, 2)[mask] for x in tensors]
    bounds = functional.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    keep, terms = mask[:, None, None], AttentionTerms(scale=SCALE)

    def padded() -> Tensor:
        out = functional.scaled_dot_product_attention(*tensors, attn_mask=keep)
        return out.transpose(1, 2)[mask]

    def packed_by_pytorch() -> Callable[[], Any]:
        if mask.device.type == "cpu":
            raise MissingError("PyTorch's varlen_attn runs on a GPU")
        from torch.nn.attention.varlen import varlen_attn

        return lambda: varlen_attn(*packed, bounds, bounds, BATCH.seq, BATCH.seq)

    compared(
        "varlen_attention, 47% fill",
        {
            PYTORCH: padded,
            REFERENCE: lambda: varlen_attention_reference(*packed, bounds, bounds, True, terms)[0],
            FASTATTN: lambda: ops.varlen_attention(*packed, bounds, bounds, BATCH.seq, BATCH.seq),
        },
        {"PyTorch varlen_attn": packed_by_pytorch},
    )


@pytest.mark.parametrize("layout", ["contiguous", "paged"])
@contenders(PYTORCH, *SDPA_BACKENDS, REFERENCE, FASTATTN)
def test_decode_attention(compared: Any, randn: Randn, device: str, layout: str) -> None:
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
    cache, terms = DecodeCache(*caches, lengths, table, None, None), AttentionTerms(scale=SCALE)
    compared(
        f"decode_attention, {layout}",
        {
            PYTORCH: lambda: functional.scaled_dot_product_attention(query, key, value, enable_gqa=True),
            REFERENCE: lambda: decode_attention_reference(query, cache, terms)[0],
            FASTATTN: lambda: ops.decode_attention(query, *caches, lengths, table),
        },
        sdpa_backends([query, key, value], enable_gqa=True),
    )
