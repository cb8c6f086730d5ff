"""Packed attention on the GPU against float64, sequence by sequence."""

from __future__ import annotations

from typing import Any

import gpu_exact
import pytest
import torch
from gpu_checks import Draw, assert_exact, bounds, length, run_twice
from torch import Tensor

from fastattn import ops

HEADS = 4


def relative(draw: Draw, kind: str) -> dict[str, Any]:
    return {"relative": gpu_exact.Relative(draw(32, HEADS, dtype=torch.float32), kind, 128)}


FLAGS = {
    "plain": lambda draw, batch: {},
    "causal": lambda draw, batch: {"causal": True},
    "start": lambda draw, batch: {"causal": True, "query_start": 5},
    "starts": lambda draw, batch: {"causal": True, "query_start": draw.integers(0, length(200), batch)},
    "t5": lambda draw, batch: relative(draw, "t5"),
    "t5-causal": lambda draw, batch: relative(draw, "t5-causal") | {"causal": True},
    "mpnet": lambda draw, batch: relative(draw, "mpnet"),
    "alibi": lambda draw, batch: {"alibi_slopes": draw(HEADS, dtype=torch.float32).abs()},
    "window": lambda draw, batch: {"window": (length(64), length(32))},
    "window-causal": lambda draw, batch: {"window": (length(64), 0), "causal": True},
    "softcap-scale": lambda draw, batch: {"softcap": 4.0, "scale": 0.25},
    "sinks": lambda draw, batch: {"sinks": draw(HEADS, dtype=torch.float32), "causal": True},
}


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, starts_q: Tensor, starts_k: Tensor, dtype: torch.dtype,
    given: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [Tq, Hq, Dv] and lse [Hq, Tq]: each sequence as a batch of one."""
    outs, sums = [], []
    edges_q, edges_k = starts_q.tolist(), starts_k.tolist()
    for sequence in range(len(edges_q) - 1):
        rows = slice(edges_q[sequence], edges_q[sequence + 1])
        columns = slice(edges_k[sequence], edges_k[sequence + 1])
        own = dict(given)
        if isinstance(own.get("query_start"), Tensor):
            own["query_start"] = int(own["query_start"][sequence])
        parts = (query[rows], key[columns], value[columns])
        out, lse = gpu_exact.attention(*(part.transpose(0, 1)[None] for part in parts), dtype, **own)
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


def launched(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: list[int], lengths_k: list[int],
    given: dict[str, Any],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The op's out and lse, computed twice into poisoned memory."""
    named = dict(given)
    table = named.pop("relative", None)
    if table is not None:
        named["relative_bias"] = ops.RelativeBias(table.table, table.kind, table.max_distance)
    starts = bounds(lengths_q, query.device), bounds(lengths_k, query.device)
    # Upper bounds, not the maxima.
    limits = (max(lengths_q) + 7, max(lengths_k) + 3)
    return run_twice(
        lambda: ops.varlen_attention(query, key, value, *starts, *limits, return_lse=True, **named)
    )


def check(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: list[int], lengths_k: list[int],
    given: dict[str, Any],
) -> None:  # fmt: skip
    """What is launched against float64."""
    out, lse = launched(query, key, value, lengths_q, lengths_k, given)
    starts = bounds(lengths_q, query.device), bounds(lengths_k, query.device)
    exact = one_by_one(query, key, value, *starts, torch.float64, given)
    own = one_by_one(query, key, value, *starts, query.dtype, given)
    assert_exact(out, exact[0], own[0], "out")
    assert_exact(lse, exact[1], own[1], "lse")


def drawn(flags: str, draw: Draw) -> tuple[Tensor, Tensor, Tensor, list[int], list[int], dict[str, Any]]:
    """A call with these flags over sequences of random lengths, empty ones and single tokens among them."""
    lengths_q, lengths_k = drawn_lengths(draw), drawn_lengths(draw)
    query = draw(sum(lengths_q), HEADS, 64)
    key, value = draw(sum(lengths_k), 2, 64), draw(sum(lengths_k), 2, 64)
    return query, key, value, lengths_q, lengths_k, FLAGS[flags](draw, len(lengths_q))


def drawn_lengths(draw: Draw) -> list[int]:
    lengths = draw.integers(1, length(300), 5).tolist()
    return [*lengths[:2], 0, 1, *lengths[2:]]


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(flags: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    check(*drawn(flags, Draw(generator, device, dtype)))


@pytest.mark.parametrize("sizes", [(32, 32), (80, 80), (128, 128), (256, 256), (64, 128)])
def test_head_sizes(
    sizes: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    lengths = drawn_lengths(draw)
    query, key = (draw(sum(lengths), HEADS, sizes[0]) for _ in range(2))
    check(query, key, draw(sum(lengths), HEADS, sizes[1]), lengths, lengths, {"causal": True})


def test_one_buffer_of_three(dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    """Query, key and value as slices of one projection's output."""
    draw = Draw(generator, device, dtype)
    lengths = drawn_lengths(draw)
    query, key, value = draw(sum(lengths), 3, HEADS, 64).unbind(1)
    check(query, key, value, lengths, lengths, {})
