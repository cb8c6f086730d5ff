"""Decoding as hypothesis draws it: queries, caches in every layout with garbage where nothing may be read.
And the formula, which shares nothing with the implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

__all__ = ["DecodeCase", "decode_cases", "decode_formula"]

INT8, FP8 = torch.int8, torch.float8_e4m3fn


def decode_formula(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, dtype: torch.dtype, *, window: int = -1,
    scale: float = 1.0, softcap: float = 0.0, sinks: Tensor | None = None, alibi_slopes: Tensor | None = None,
    relative: tuple[Tensor, str, int] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output [B, Hq, Sq, Dv] and logsumexp [B, Hq, Sq] over all scores [B, Hq, Sq, S], in `dtype`."""
    batch, heads, queries, _ = query.shape
    group = heads // key.shape[1]
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    position = (lengths[:, None] - queries + torch.arange(queries))[:, None, :, None]
    distance = torch.arange(key.shape[2]) - position
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if relative is not None:
        table, kind, max_distance = relative
        buckets = _transformers_buckets(kind, distance[:, 0], len(table), max_distance)
        scores = scores + table.to(dtype)[buckets].permute(0, 3, 1, 2)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.abs().to(dtype)
    visible = distance <= 0
    if window >= 0:
        visible = visible & (distance >= -window)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype)[:, None, None].expand(batch, heads, queries, 1)], -1)
    if scores.shape[-1] == 0:
        return value.new_zeros(*query.shape[:3], value.shape[3]), query.new_full(query.shape[:3], -torch.inf)
    weights = torch.softmax(scores, -1)[..., : key.shape[2]].nan_to_num()
    return weights @ value, torch.logsumexp(scores, -1)


def _transformers_buckets(kind: str, distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
    from transformers.models.t5.modeling_t5 import T5Attention

    if kind == "mpnet":
        return MPNetEncoder.relative_position_bucket(distance, num_buckets, max_distance)
    return T5Attention._relative_position_bucket(distance, kind == "t5", num_buckets, max_distance)


@dataclass(frozen=True)
class DecodeCase:
    """What hypothesis draws; the tensors follow from it and the seed.

    `block_size` 0 is a contiguous cache, in `layout`; `window` -1 and `softcap` 0 are none.
    """

    seed: int
    dtype: torch.dtype
    cache_dtype: torch.dtype | None
    lengths: tuple[int, ...]
    capacity: int
    queries: int
    key_heads: int
    group: int
    head_dim: int
    value_dim: int
    block_size: int
    layout: str
    window: int
    scale: float
    softcap: float
    sinks: bool
    alibi: bool
    relative: str | None

    @property
    def heads(self) -> int:
        return self.key_heads * self.group

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The arguments of the operation's contract (its relative bias as `relative`: table, kind, distance),
        and the dense keys and values that the formula takes, [B, Hkv, S, D] in float64.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        batch, lengths = len(self.lengths), torch.tensor(self.lengths, dtype=torch.int32)
        found: dict[str, Any] = dict(
            query=normal(batch, self.queries, self.heads, self.head_dim).to(self.dtype).transpose(1, 2),
            cache_lengths=lengths,
            sinks=normal(self.heads) * 2 if self.sinks else None,
            alibi_slopes=torch.rand(self.heads, generator=generator) if self.alibi else None,
            relative=None if self.relative is None else (normal(8, self.heads), self.relative, 12),
        )
        first = (lengths - self.queries - self.window).clamp(min=0) if self.window >= 0 else lengths * 0
        column = torch.arange(self.capacity)
        read = (column >= first[:, None]) & (column < lengths[:, None])
        found["block_table"], pages = self._table(read, generator)
        for name, head_dim in (("key", self.head_dim), ("value", self.value_dim)):
            rows = normal(batch, self.key_heads, self.capacity, head_dim)
            scale = torch.ones(self.key_heads)
            if self.cache_dtype is not None:
                scale = torch.rand(self.key_heads, generator=generator) * 0.02 + 0.01
                rows = (rows * 40).clamp(-127, 127)
            rows = rows.to(self.cache_dtype or self.dtype)
            found[f"{name}_scale"] = None if self.cache_dtype is None else scale
            dense = rows.double() * scale.double()[:, None, None]
            found[name] = dense.masked_fill(~read[:, None, :, None], 0.0)
            found[f"{name}_cache"] = self._cache(rows, read, pages)
        return found

    def _table(self, read: Tensor, generator: torch.Generator) -> tuple[Tensor | None, Tensor | None]:
        """The page table with wrong entries where no key is read, and with pages of their own there."""
        if not self.block_size:
            return None, None
        width = -(-self.capacity // self.block_size)
        batch = len(read)
        pages = torch.randperm(batch * width + 3, generator=generator)[: batch * width].view(batch, width)
        used = torch.zeros(batch, width, dtype=torch.bool)
        sequence, key = read.nonzero(as_tuple=True)
        used[sequence, key // self.block_size] = True
        wrong = torch.tensor([-1, 10**6])[torch.arange(width) % 2]
        return torch.where(used, pages, wrong).to(torch.int32), pages

    def _cache(self, rows: Tensor, read: Tensor, pages: Tensor | None) -> Tensor:
        """`rows` where the operation looks for them, with NaN in every row it may not read."""
        garbage = 127 if self.cache_dtype == INT8 else torch.nan
        if pages is None:
            batch, heads, capacity, head_dim = rows.shape
            rows = rows.float().masked_fill(~read[:, None, :, None], garbage).to(rows.dtype)
            if self.layout == "length major":
                return rows.transpose(1, 2).contiguous().transpose(1, 2)
            if self.layout == "head_dim major":
                return rows.mT.contiguous().mT
            if self.layout == "every other":
                wide = torch.full((batch, heads, 2 * capacity, head_dim), garbage).to(rows.dtype)
                wide[:, :, ::2] = rows
                return wide[:, :, ::2]
            return rows
        shape = (pages.numel() + 3, self.block_size, rows.shape[1], rows.shape[3])
        cache = torch.full(shape, garbage).to(rows.dtype)
        sequence, key = read.nonzero(as_tuple=True)
        where = pages[sequence, key // self.block_size], key % self.block_size
        # As integers of their size: PyTorch cannot index float8.
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.itemsize]
        cache.view(integers)[where] = rows.view(integers)[sequence, :, key]
        return cache

    def expected(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Output and logsumexp by the formula in `dtype`."""
        tensors = self.tensors
        return decode_formula(
            *(tensors[name] for name in ("query", "key", "value", "cache_lengths")), dtype,
            window=self.window, scale=self.scale, softcap=self.softcap,
            **{name: tensors[name] for name in ("sinks", "alibi_slopes", "relative")},
        )  # fmt: skip


@st.composite
def decode_cases(
    draw: st.DrawFn,
    dtypes: tuple[torch.dtype, ...],
    head_dims: tuple[int, ...] = (16, 24, 40),
    batch: int = 3,
    rows: int = 60,
    capacity: int = 90,
) -> DecodeCase:
    """Cases of up to `batch` sequences, `rows` queries times heads and `capacity` keys."""
    queries = draw(st.one_of(st.just(1), st.integers(1, min(rows, 16))))
    key_heads = draw(st.sampled_from([n for n in (1, 2, 3) if n * queries <= rows]))
    group = draw(st.sampled_from([n for n in (1, 2, 3, 4, 8, 20) if n * key_heads * queries <= rows]))
    keys = draw(st.integers(0, capacity))
    # Empty, full and anything between; with fewer keys than queries the first see nothing.
    length = st.one_of(st.just(0), st.just(keys), st.integers(0, keys), st.integers(0, min(keys, queries)))
    return DecodeCase(
        seed=draw(st.integers(0, 2**16)),
        dtype=draw(st.sampled_from(dtypes)),
        cache_dtype=draw(st.sampled_from((None, None, INT8, FP8))),
        lengths=tuple(draw(st.lists(length, min_size=1, max_size=batch))),
        capacity=keys,
        queries=queries,
        key_heads=key_heads,
        group=group,
        head_dim=draw(st.sampled_from(head_dims)),
        value_dim=draw(st.sampled_from(head_dims)),
        block_size=draw(st.sampled_from((0, 0, 1, 5, 16, 32, 64))),
        layout=draw(st.sampled_from(("plain", "length major", "head_dim major", "every other"))),
        window=draw(st.one_of(st.just(-1), st.integers(0, capacity + 5))),
        scale=draw(st.sampled_from((0.125, 0.3, -0.2))),
        softcap=draw(st.sampled_from((0.0, 0.0, 2.0, 30.0))),
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        relative=draw(st.sampled_from((None, None, "t5", "t5-causal", "mpnet"))),
    )
