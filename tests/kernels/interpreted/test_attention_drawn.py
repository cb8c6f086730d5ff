"""Attention over drawn shapes, strides, masks and terms in the interpreter, against float64.

Tiles are as small as a dot allows, so that a few dozen keys are several blocks of every kind.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import DRAWN, check, check_varlen, tiles
from fastattn_kernels.attention_config import AttentionConfig
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

# Reproducible in every run, and no failure of another day's code is replayed. Not shrunk: an interpreted case
# takes too long for that, and the failure prints what was drawn.
drawn = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)  # fmt: skip
# One interpreted program takes some 10 ms, one block in it 3 ms.
MOST_BLOCKS = 14
HEAD_DIMS = [16, 8, 24, 32, 33, 1, 40, 64, 80, 128]


def arranged(draw: st.DrawFn, x: torch.Tensor) -> torch.Tensor:
    """`x` [B, H, S, D] with strides as models, caches and slices have them."""
    layout = draw(st.sampled_from(["as is", "sequence major", "slice", "feature major", "every other"]))
    if layout == "sequence major":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "slice":
        return torch.nn.functional.pad(x, (3, 2, 1, 0))[:, :, 1:, 3:-2]
    if layout == "feature major":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "every other":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def choose_tiles(draw: st.DrawFn, rows: int, queries: int, keys: int) -> AttentionConfig:
    """Drawn tiles, doubled until `rows` heads of this many queries and keys are few enough blocks."""
    block_m, block_n = draw(st.sampled_from([(16, 16), (32, 16), (16, 32), (32, 32)]))
    while rows * -(-queries // block_m) * -(-keys // block_n) > MOST_BLOCKS and block_m * block_n < 128**2:
        block_m, block_n = (block_m * 2, block_n) if block_m <= block_n else (block_m, block_n * 2)
    return AttentionConfig(block_m, block_n, 4, 1, descriptors=draw(st.booleans()))


def normal(draw: st.DrawFn, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**16))))


def heads_and_sizes(draw: st.DrawFn) -> dict[str, Any]:
    """Head counts, head sizes, dtype and scale."""
    key_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 2), (1, 3), (2, 2)]))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    return dict(
        key_heads=key_heads,
        heads=key_heads * group,
        head_dim=head_dim,
        value_dim=draw(st.sampled_from([head_dim, *HEAD_DIMS])),
        dtype=draw(st.sampled_from([torch.float16, torch.float32])),
        scale=draw(st.sampled_from([head_dim**-0.5, head_dim**-0.5, 1.0, -0.3, 0.0])),
    )


def score_terms(draw: st.DrawFn, heads: int) -> dict[str, Any]:
    """What changes the scores, or joins them, beside a dense bias."""
    flags: dict[str, Any] = {}
    if draw(st.booleans()):
        flags["softcap"] = draw(st.sampled_from([0.5, 5.0, 50.0]))
    if draw(st.booleans()):
        flags["sinks"] = 2 * normal(draw, heads)
    if draw(st.booleans()):
        # As models have them, and as somebody may slice or sign them.
        slopes = draw(st.sampled_from([2.0, 0.5, 0.01, -0.1])) * normal(draw, 2 * heads).abs()
        flags["alibi_slopes"] = slopes[::2]
    if draw(st.booleans()):
        kind = draw(st.sampled_from(["t5", "t5-causal", "mpnet"]))
        buckets = draw(st.sampled_from([32, 8, 5, 4]))
        table = normal(draw, heads, buckets).T
        dtype = draw(st.sampled_from([torch.float32, torch.float16]))
        flags |= dict(rel_table=table.to(dtype), rel_kind=kind)
        flags["rel_max_distance"] = draw(st.sampled_from([128, 20, 17]))
    return flags


def window(draw: st.DrawFn) -> dict[str, Any]:
    flags: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        flags["window_left"] = draw(st.integers(0, 45))
    if draw(st.booleans()):
        flags["window_right"] = draw(st.integers(0, 45))
    return flags


def dense_case(
    draw: st.DrawFn, *, layouts: bool, masks: bool, positions: bool, terms: bool, dropout: bool
) -> None:
    sizes = heads_and_sizes(draw)
    batch = draw(st.sampled_from([1, 1, 2, 3]))
    heads, dtype = sizes["heads"], sizes["dtype"]
    queries, keys = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    query = normal(draw, batch, heads, queries, sizes["head_dim"]).to(dtype)
    key = normal(draw, batch, sizes["key_heads"], keys, sizes["head_dim"]).to(dtype)
    value = normal(draw, batch, sizes["key_heads"], keys, sizes["value_dim"]).to(dtype)
    flags: dict[str, Any] = {"scale": sizes["scale"]}
    if layouts:
        query, key, value = (arranged(draw, x) for x in (query, key, value))
    if masks:
        shape = [draw(st.sampled_from([1, full])) for full in (batch, heads, queries, keys)]
        if draw(st.booleans()):
            padding = draw(st.booleans())
            mask = normal(draw, *((batch, keys) if padding else shape)) > draw(st.sampled_from([-1.0, 0.5]))
            flags["mask"] = mask if padding else arranged(draw, mask)
        if draw(st.booleans()):
            bias = arranged(draw, normal(draw, *shape))
            flags["bias"] = bias.to(draw(st.sampled_from([dtype, torch.float32])))
        if draw(st.booleans()):
            lengths = draw(st.lists(st.integers(0, keys + 5), min_size=batch, max_size=batch))
            flags["key_lengths"] = torch.tensor(
                lengths, dtype=draw(st.sampled_from([torch.int32, torch.int64]))
            )
            for sequence, length in enumerate(lengths):
                key[sequence, :, length:] = value[sequence, :, length:] = float("nan")
    if positions:
        flags |= window(draw)
        start = st.one_of(st.just(keys - queries), st.integers(-80, 80))
        if draw(st.booleans()):
            flags["query_starts"] = torch.tensor(draw(st.lists(start, min_size=batch, max_size=batch)))
        else:
            flags["query_start"] = draw(start)
    if terms:
        flags |= score_terms(draw, heads)
    if dropout:
        flags |= dict(
            dropout_p=draw(st.sampled_from([0.1, 0.6])), seed=torch.tensor([draw(st.integers(0, 2**40))])
        )
    with tiles(choose_tiles(draw, batch * heads, queries, keys)):
        check(query, key, value, **flags)


def varlen_case(draw: st.DrawFn, *, terms: bool, dropout: bool) -> None:
    sizes = heads_and_sizes(draw)
    heads, dtype = sizes["heads"], sizes["dtype"]
    length = st.one_of(st.integers(0, 40), st.sampled_from([0, 1, 16, 32]))
    pairs = draw(st.lists(st.tuples(length, length), min_size=1, max_size=4))
    query_lengths, key_lengths = [[pair[side] for pair in pairs] for side in (0, 1)]
    if draw(st.booleans()):
        key_lengths = query_lengths
    tokens, key_tokens = sum(query_lengths), sum(key_lengths)
    query = normal(draw, tokens, heads, sizes["head_dim"]).to(dtype)
    if draw(st.booleans()):
        query = query.transpose(0, 1).contiguous().transpose(0, 1)
    # As two parts of one projection arrive.
    joint = normal(draw, key_tokens, sizes["key_heads"], sizes["head_dim"] + sizes["value_dim"]).to(dtype)
    key, value = joint.split([sizes["head_dim"], sizes["value_dim"]], -1)
    flags: dict[str, Any] = {"scale": sizes["scale"]} | window(draw)
    if draw(st.booleans()):
        flags["default_start"] = False
        start = st.integers(-45, 45)
        if draw(st.booleans()):
            flags["query_starts"] = torch.tensor([draw(start) for _ in pairs])
        else:
            flags["query_start"] = draw(start)
    if terms:
        flags |= score_terms(draw, heads)
    if dropout:
        flags |= dict(dropout_p=0.3, seed=torch.tensor([draw(st.integers(0, 2**40))]))
    config = choose_tiles(draw, heads * len(pairs), max(query_lengths), max(key_lengths))
    with tiles(config):
        check_varlen(
            query, key, value, query_lengths, key_lengths, slack=draw(st.sampled_from([0, 0, 9])), **flags
        )


PLAIN = dict(layouts=False, masks=False, positions=False, terms=False, dropout=False)


@settings(drawn, max_examples=80)
@given(data=st.data())
def test_sizes_and_layouts(data: st.DataObject) -> None:
    dense_case(data.draw, **PLAIN | dict(layouts=True))
    DRAWN["sizes and layouts"] += 1


@settings(drawn, max_examples=80)
@given(data=st.data())
def test_masks_biases_and_lengths(data: st.DataObject) -> None:
    dense_case(data.draw, **PLAIN | dict(masks=True))
    DRAWN["masks"] += 1


@settings(drawn, max_examples=100)
@given(data=st.data())
def test_causality_windows_and_starts(data: st.DataObject) -> None:
    dense_case(data.draw, **PLAIN | dict(positions=True))
    DRAWN["positions"] += 1


@settings(drawn, max_examples=80)
@given(data=st.data())
def test_score_terms(data: st.DataObject) -> None:
    dense_case(data.draw, **PLAIN | dict(positions=True, terms=True))
    DRAWN["terms"] += 1


@settings(drawn, max_examples=50)
@given(data=st.data())
def test_everything_together(data: st.DataObject) -> None:
    dense_case(data.draw, layouts=True, masks=True, positions=True, terms=True, dropout=True)
    DRAWN["everything"] += 1


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@settings(drawn, max_examples=60)
@given(data=st.data())
def test_packed_sequences(dropout: bool, data: st.DataObject) -> None:
    varlen_case(data.draw, terms=dropout, dropout=dropout)
    DRAWN["packed"] += 1
