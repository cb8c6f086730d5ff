"""Padded attention on the GPU, flag by flag and shape by shape, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_exact
import pytest
import torch
from gpu_checks import Draw, assert_exact, length, run_twice
from torch import Tensor

from fastattn import ops

# Flags as functions of the call's shape [B, Hq, Sq, Sk]: the arguments of both faces.
Shape = tuple[int, int, int, int]
Flags = Callable[[Draw, Shape], dict[str, Any]]


def relative(draw: Draw, shape: Shape, kind: str, max_distance: int = 128) -> dict[str, Any]:
    table = draw(32, shape[1], dtype=torch.float32)
    return {"relative": gpu_exact.Relative(table, kind, max_distance)}


FLAGS: dict[str, Flags] = {
    "plain": lambda draw, s: {},
    "causal": lambda draw, s: {"causal": True},
    "start": lambda draw, s: {"causal": True, "query_start": s[3] // 3},
    "negative-start": lambda draw, s: {"causal": True, "query_start": -(s[2] // 2)},
    "starts": lambda draw, s: {"causal": True, "query_start": draw.integers(0, s[3], s[0])},
    "lengths": lambda draw, s: {"key_lengths": draw.integers(0, s[3], s[0])},
    "lengths-causal": lambda draw, s: {"causal": True, "key_lengths": draw.integers(0, s[3], s[0])},
    "padding": lambda draw, s: {"mask": draw.mask(s[0], s[3])},
    "padding-causal": lambda draw, s: {"mask": draw.mask(s[0], s[3]), "causal": True},
    "mask-query": lambda draw, s: {"mask": draw.mask(s[0], 1, s[2], s[3])},
    "mask-head": lambda draw, s: {"mask": draw.mask(1, s[1], s[2], s[3], share=0.1)},
    "mask-empty": lambda draw, s: {"mask": draw.mask(s[0], 1, s[2], 1, share=0.5)},
    "bias": lambda draw, s: {"bias": draw(s[0], s[1], s[2], s[3])},
    "bias-head": lambda draw, s: {"bias": draw(1, s[1], s[2], s[3]), "causal": True},
    "bias-key": lambda draw, s: {"bias": draw(s[0], 1, 1, s[3])},
    "t5": lambda draw, s: relative(draw, s, "t5"),
    "t5-near": lambda draw, s: relative(draw, s, "t5", max_distance=20),
    "t5-padding": lambda draw, s: relative(draw, s, "t5") | {"mask": draw.mask(s[0], s[3])},
    "t5-causal": lambda draw, s: relative(draw, s, "t5-causal") | {"causal": True},
    "mpnet": lambda draw, s: relative(draw, s, "mpnet"),
    "alibi": lambda draw, s: {"alibi_slopes": draw(s[1], dtype=torch.float32).abs()},
    "alibi-causal": lambda draw, s: {"alibi_slopes": draw(s[1], dtype=torch.float32).abs(), "causal": True},
    "window": lambda draw, s: {"window": (length(100), length(50))},
    "window-left": lambda draw, s: {"window": (length(64), -1)},
    "window-causal": lambda draw, s: {"window": (length(64), 0), "causal": True},
    "softcap": lambda draw, s: {"softcap": 3.0},
    "softcap-bias": lambda draw, s: {"softcap": 2.0, "bias": draw(1, s[1], 1, s[3]), "causal": True},
    "sinks": lambda draw, s: {"sinks": draw(s[1], dtype=torch.float32)},
    "sinks-empty": lambda draw, s: {
        "sinks": draw(s[1], dtype=torch.float32), "key_lengths": draw.integers(0, 2, s[0])
    },
    "scale": lambda draw, s: {"scale": 0.3},
    "everything": lambda draw, s: {
        "mask": draw.mask(s[0], 1, s[2], s[3]), "bias": draw(1, s[1], s[2], s[3]), "causal": True,
        "key_lengths": draw.integers(1, s[3], s[0]), "window": (length(200), -1), "softcap": 5.0,
        "sinks": draw(s[1], dtype=torch.float32), "alibi_slopes": draw(s[1], dtype=torch.float32).abs(),
        **relative(draw, s, "t5-causal"),
    },
}  # fmt: skip


def drawn(flags: str, draw: Draw) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A call with these flags: neither length fills its last tile, and there are several tiles of each."""
    shape = (2, 4, length(417), length(689))
    query = draw.heads(2, 4, shape[2], 64)
    key, value = draw.heads(2, 2, shape[3], 64), draw.heads(2, 2, shape[3], 64)
    return query, key, value, FLAGS[flags](draw, shape)


def launched(query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> tuple[Tensor, ...]:
    """The op's out and lse, computed twice into poisoned memory."""
    named = dict(given)
    table = named.pop("relative", None)
    if table is not None:
        named["relative_bias"] = ops.RelativeBias(table.table, table.kind, table.max_distance)
    return run_twice(lambda: ops.attention(query, key, value, return_lse=True, **named))


def check(query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> None:
    """What is launched against float64."""
    out, lse = launched(query, key, value, given)
    exact = gpu_exact.attention(query, key, value, torch.float64, **given)
    own = gpu_exact.attention(query, key, value, query.dtype, **given)
    assert_exact(out, exact[0], own[0], "out")
    assert_exact(lse, exact[1], own[1], "lse")


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    check(*drawn(flags, Draw(generator, device, dtype)))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    "sizes", [16, 24, 32, 40, 80, 96, 128, 160, 192, 256, (64, 128), (192, 128), (128, 40)]
)
def test_head_sizes(
    sizes: int | tuple[int, int], causal: bool, dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    draw = Draw(generator, device, dtype)
    size, value_size = sizes if isinstance(sizes, tuple) else (sizes, sizes)
    query, key = draw.heads(1, 2, length(200), size), draw.heads(1, 2, length(300), size)
    value = draw.heads(1, 2, length(300), value_size)
    check(query, key, value, {"causal": causal, "mask": draw.mask(1, length(300))})


@pytest.mark.parametrize(
    "lengths", [(1, 1), (1, 700), (16, 16), (17, 129), (128, 128), (1000, 1), (500, 300)]
)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=["mha", "gqa", "mqa"])
def test_lengths_and_heads(
    lengths: tuple[int, int], heads: tuple[int, int], dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    draw = Draw(generator, device, dtype)
    query = draw.heads(2, heads[0], length(lengths[0]), 64)
    key, value = (draw.heads(2, heads[1], length(lengths[1]), 64) for _ in range(2))
    check(query, key, value, {"causal": True})
    check(query, key, value, {})


@pytest.mark.parametrize("layout", ["contiguous", "last-stride", "expanded", "slice", "fused", "unaligned"])
def test_strides(layout: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    draw = Draw(generator, device, dtype)
    sequence, size = length(260), 64
    if layout == "contiguous":
        query, key, value = (draw(2, 4, sequence, size) for _ in range(3))
    elif layout == "last-stride":
        query, key, value = (draw(2, 4, size, sequence).transpose(2, 3) for _ in range(3))
    elif layout == "expanded":
        query, key, value = (draw(1, 1, sequence, size).expand(2, 4, -1, -1) for _ in range(3))
    elif layout == "slice":
        query, key, value = (draw(2, 4, 2 * sequence, 2 * size)[:, :, 1::2, ::2] for _ in range(3))
    elif layout == "fused":
        query, key, value = draw(2, sequence, 3, 4, size).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        query, key, value = (
            draw(2 * 4 * sequence * size + 1)[1:].view(2, 4, sequence, size) for _ in range(3)
        )
    check(query, key, value, {"causal": True})
    mask = draw.mask(2, 1, sequence, 2 * sequence)[..., 1 : sequence + 1]
    check(query, key, value, {"mask": mask, "bias": draw(1, sequence, 4, sequence).transpose(1, 2)})


def test_keys_past_their_length_are_never_read(
    dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    keys = length(300)
    query, key, value = (draw.heads(2, 2, keys, 64) for _ in range(3))
    lengths = draw.integers(1, keys - 1, 2)
    past = (torch.arange(keys, device=device) >= lengths[:, None])[:, None, :, None]
    key, value = (x.masked_fill(past, float("nan")) for x in (key, value))
    check(query, key, value, {"key_lengths": lengths})


def test_no_keys_and_no_queries(dtype: torch.dtype, device: torch.device) -> None:
    query, nothing = (torch.ones(2, 2, count, 64, dtype=dtype, device=device) for count in (3, 0))
    out, lse = run_twice(lambda: ops.attention(query, nothing, nothing, return_lse=True))
    assert not out.any() and (lse == -float("inf")).all()
    assert ops.attention(nothing, query, query).shape == (2, 2, 0, 64)


@pytest.mark.parametrize("flags", ["plain", "lengths-causal", "everything"])
def test_dropout_is_the_reference_s(
    flags: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """The same seed drops the same weights in the kernel and in float64 PyTorch."""
    import fastattn

    draw = Draw(generator, device, dtype)
    shape = (2, 2, length(200), length(333))
    query = draw.heads(2, 2, shape[2], 64)
    key, value = draw.heads(2, 2, shape[3], 64), draw.heads(2, 2, shape[3], 64)
    named = FLAGS[flags](draw, shape)
    table = named.pop("relative", None)
    if table is not None:
        named["relative_bias"] = ops.RelativeBias(table.table, table.kind, table.max_distance)

    def seeded(*tensors: Tensor) -> Tensor:
        torch.manual_seed(7)
        return ops.attention(*tensors, dropout_p=0.3, **named)

    (found,) = run_twice(lambda: seeded(query, key, value))
    with fastattn.set_backend("torch"):
        own = seeded(query, key, value)
        named = {name: x.double() if name == "bias" else x for name, x in named.items()}
        exact = seeded(query.double(), key.double(), value.double())
    assert_exact(found, exact, own)


@pytest.mark.parametrize("sequence", [4096, 8192])
def test_long_sequences(
    sequence: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """Many key blocks a query: what a running maximum and sum lose shows here."""
    draw = Draw(generator, device, dtype)
    count = length(sequence)
    query, key, value = (draw.heads(1, 1, count, 128) for _ in range(3))
    check(query * 3, key, value, {"causal": True})
