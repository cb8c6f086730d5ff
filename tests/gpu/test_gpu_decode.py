"""Decode attention on the GPU over contiguous and paged caches, quantized ones too, against float64."""

from __future__ import annotations

from typing import Any

import gpu_exact
import pytest
import torch
from gpu_checks import Draw, assert_exact, length, run_twice
from torch import Tensor

from fastattn import ops

HEADS, CACHE_HEADS = 8, 2


def relative(draw: Draw) -> dict[str, Any]:
    return {"relative": gpu_exact.Relative(draw(32, HEADS, dtype=torch.float32), "t5-causal", 128)}


FLAGS = {
    "plain": lambda draw: {},
    "window": lambda draw: {"window": (length(100), 0)},
    "softcap": lambda draw: {"softcap": 3.0, "scale": 0.2},
    "sinks": lambda draw: {"sinks": draw(HEADS, dtype=torch.float32)},
    "alibi": lambda draw: {"alibi_slopes": draw(HEADS, dtype=torch.float32).abs()},
    "relative": relative,
    "everything": lambda draw: {
        "window": (length(300), 0), "softcap": 3.0, "sinks": draw(HEADS, dtype=torch.float32),
        "alibi_slopes": draw(HEADS, dtype=torch.float32).abs(), **relative(draw),
    },
}  # fmt: skip


def pages_of(cache: Tensor, block_size: int, draw: Draw) -> tuple[Tensor, Tensor]:
    """A cache [B, H, S, D] as pages in random order with its block table; some pages are nobody's."""
    batch, heads, positions, size = cache.shape
    count = -(-positions // block_size)
    padded = torch.nn.functional.pad(cache.float(), (0, 0, 0, count * block_size - positions))
    blocks = padded.view(batch, heads, count, block_size, size).permute(0, 2, 3, 1, 4).flatten(0, 1)
    order = draw.permutation(batch * count + 3)[: batch * count]
    pages = torch.zeros(batch * count + 3, block_size, heads, size, device=cache.device)
    pages[order.long()] = blocks
    return pages.to(cache.dtype), order.view(batch, count)


def quantized(cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The cache in `dtype` and its scales [Hkv]."""
    limit = 127.0 if dtype == torch.int8 else 448.0
    scale = cache.float().abs().amax((0, 2, 3)).clamp(min=1e-6) / limit
    scaled = cache.float() / scale[:, None, None]
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def launched(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, given: dict[str, Any],
    *, block_size: int = 0, draw: Draw | None = None, scales: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's out and lse, computed twice into poisoned memory, over pages where there is a block size."""
    named = dict(given)
    table = named.pop("relative", None)
    if table is not None:
        named["relative_bias"] = ops.RelativeBias(table.table, table.kind, table.max_distance)
    if scales is not None:
        named |= {"key_scale": scales[0], "value_scale": scales[1]}
    caches: tuple[Tensor, ...] = (key, value)
    block_table = None
    if block_size:
        assert draw is not None
        pages, block_table = pages_of(torch.cat([key.float(), value.float()], -1), block_size, draw)
        caches = tuple(part.to(key.dtype) for part in pages.split((key.shape[3], value.shape[3]), -1))
    return run_twice(
        lambda: ops.decode_attention(query, *caches, lengths, block_table, return_lse=True, **named)
    )


def check(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, given: dict[str, Any],
    *, block_size: int = 0, draw: Draw | None = None, scales: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """What is launched against float64."""
    out, lse = launched(query, key, value, lengths, given, block_size=block_size, draw=draw, scales=scales)
    if scales is not None:
        key, value = (x.float() * scale[:, None, None] for x, scale in zip((key, value), scales, strict=True))
    start = lengths.long() - query.shape[2]
    shared = {**given, "causal": True, "query_start": start, "key_lengths": lengths}
    exact = gpu_exact.attention(query, key, value, torch.float64, **shared)
    own = gpu_exact.attention(query, key, value, query.dtype, **shared)
    assert_exact(out, exact[0], own[0], "out")
    assert_exact(lse, exact[1], own[1], "lse")


def drawn(flags: str, draw: Draw) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
    """A call with these flags of one new token a sequence."""
    positions = length(1500)
    key, value = (draw(3, CACHE_HEADS, positions, 64) for _ in range(2))
    lengths = draw.integers(1, positions, 3)
    return draw.heads(3, HEADS, 1, 64), key, value, lengths, FLAGS[flags](draw)


def drawn_quantized(flags: str, cache_dtype: torch.dtype, draw: Draw) -> tuple[Any, ...]:
    """The arguments of a call over a quantized cache, its scales last."""
    positions = length(1200)
    (key, key_scale), (value, value_scale) = (
        quantized(draw(2, CACHE_HEADS, positions, 128), cache_dtype) for _ in range(2)
    )
    lengths = draw.integers(4, positions, 2)
    query = draw.heads(2, HEADS, 4, 128)
    return query, key, value, lengths, FLAGS[flags](draw), (key_scale, value_scale)


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("block_size", [0, 16, 256], ids=["contiguous", "paged16", "paged256"])
def test_flags(
    flags: str, block_size: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    check(*drawn(flags, draw), block_size=block_size, draw=draw)


@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (32, 4), (7, 1)], ids=["mha", "gqa4", "gqa8", "mqa7"])
def test_new_tokens_and_heads(
    queries: int, heads: tuple[int, int], dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    draw = Draw(generator, device, dtype)
    positions = length(700)
    key, value = (draw(2, heads[1], positions, 64) for _ in range(2))
    lengths = draw.integers(queries, positions, 2)
    check(draw.heads(2, heads[0], queries, 64), key, value, lengths, {})


@pytest.mark.parametrize("sizes", [(32, 32), (80, 80), (96, 96), (128, 128), (256, 256), (192, 128)])
@pytest.mark.parametrize("block_size", [0, 32], ids=["contiguous", "paged"])
def test_head_sizes(
    sizes: tuple[int, int], block_size: int, dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    draw = Draw(generator, device, dtype)
    positions = length(900)
    key, value = (draw(2, CACHE_HEADS, positions, size) for size in sizes)
    lengths = draw.integers(1, positions, 2)
    query = draw.heads(2, HEADS, 1, sizes[0])
    check(query, key, value, lengths, {}, block_size=block_size, draw=draw)


@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "fp8"])
@pytest.mark.parametrize("flags", ["plain", "everything"])
@pytest.mark.parametrize("block_size", [0, 16], ids=["contiguous", "paged"])
def test_quantized_caches(
    cache_dtype: torch.dtype, flags: str, block_size: int, dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    draw = Draw(generator, device, dtype)
    *call, scales = drawn_quantized(flags, cache_dtype, draw)
    check(*call, block_size=block_size, draw=draw, scales=scales)


def test_what_the_cache_holds_past_its_length_is_never_read(
    dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    positions = length(600)
    key, value = (draw(4, CACHE_HEADS, positions, 64) for _ in range(2))
    lengths = draw.integers(1, positions - 1, 4)
    lengths[2] = 0
    past = (torch.arange(positions, device=device) >= lengths[:, None])[:, None, :, None]
    key, value = (x.masked_fill(past, float("nan")) for x in (key, value))
    check(draw.heads(4, HEADS, 1, 64), key, value, lengths, {})


def test_strided_caches(dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    """Caches as [B, S, H, D], and as halves of one buffer."""
    draw = Draw(generator, device, dtype)
    positions = length(800)
    lengths = draw.integers(1, positions, 2)
    query = draw.heads(2, HEADS, 1, 64)
    check(
        query,
        draw.heads(2, CACHE_HEADS, positions, 64),
        draw.heads(2, CACHE_HEADS, positions, 64),
        lengths,
        {},
    )
    both = draw(2, CACHE_HEADS, positions, 128)
    check(query, both[..., :64], both[..., 64:], lengths, {})


def test_a_long_cache(dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    """Many splits, and one sequence of a single token beside them."""
    draw = Draw(generator, device, dtype)
    positions = length(33000)
    key, value = (draw(2, 1, positions, 128) for _ in range(2))
    lengths = torch.tensor([positions, 1], dtype=torch.int32, device=device)
    check(draw.heads(2, 4, 1, 128), key, value, lengths, {})
