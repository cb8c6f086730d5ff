"""`ops.attention` and `ops.varlen_attention` on what hypothesis draws: shapes, strides, masks, windows,
lengths and every term of the scores, alone and together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from attention_formula import attention_formula
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from fastattn import ops
from fastattn.ops import attention_cpu, attention_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WINDOWS = ((0, 0), (1, -1), (-1, 2), (3, 0), (2, 5), (100, 100))
properties = settings(max_examples=100, derandomize=True, deadline=None, database=None)


@dataclass(frozen=True)
class Case:
    """What hypothesis draws; the tensors follow from the seed."""

    seed: int
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    kv_heads: int
    group: int
    layout: str
    causal: bool
    window: tuple[int, int] | None
    softcap: float
    scale: float | None
    sinks: bool
    alibi: bool
    relative: str | None

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    def terms(self) -> dict[str, object]:
        """The arguments that dense and varlen share. Values are such that half precision holds them exactly
        only by luck.
        """
        table = torch.randn(8, self.heads)
        return dict(
            causal=self.causal,
            window=self.window,
            softcap=self.softcap,
            scale=self.scale,
            sinks=torch.randn(self.heads) * 2 if self.sinks else None,
            alibi_slopes=torch.rand(self.heads) if self.alibi else None,
            relative_bias=None if self.relative is None else ops.RelativeBias(table, self.relative, 12),
        )

    def tensor(self, batch: int, heads: int, length: int, head_dim: int) -> Tensor:
        """Normal numbers [batch, heads, length, head_dim] in the case's layout."""
        x = torch.randn(batch, heads, length, head_dim).to(self.dtype)
        if self.layout == "length major":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if self.layout == "head_dim major":
            return x.mT.contiguous().mT
        if self.layout == "every other":
            return x.repeat_interleave(2, dim=2)[:, :, ::2]
        if self.layout == "one head for all":
            return x[:, :1].expand(batch, heads, length, head_dim)
        return x


def cases() -> st.SearchStrategy[Case]:
    head_dims = st.one_of(st.integers(1, 256), st.sampled_from((16, 32, 64, 128)))
    return st.builds(
        Case,
        seed=st.integers(0, 2**31),
        dtype=st.sampled_from(DTYPES),
        head_dim=head_dims,
        value_dim=head_dims,
        kv_heads=st.integers(1, 3),
        group=st.integers(1, 3),
        layout=st.sampled_from(
            ("plain", "length major", "head_dim major", "every other", "one head for all")
        ),
        causal=st.booleans(),
        window=st.one_of(st.none(), st.sampled_from(WINDOWS)),
        softcap=st.sampled_from((0.0, 0.0, 2.0, 30.0)),
        scale=st.sampled_from((None, None, 0.3)),
        sinks=st.booleans(),
        alibi=st.booleans(),
        relative=st.sampled_from((None, "t5", "t5-causal", "mpnet")),
    )


def compare(query, key, value, arguments, context) -> None:
    """`ops.attention` with and without logsumexp (on the CPU two different paths) against the formula."""
    exact, exact_lse = attention_formula(query, key, value, torch.float64, **arguments)
    own, own_lse = attention_formula(query, key, value, query.dtype, **arguments)
    plain = ops.attention(query, key, value, **arguments)
    out, lse = ops.attention(query, key, value, **arguments, return_lse=True)
    assert plain.dtype == out.dtype == query.dtype and lse.dtype == torch.float32
    assert_close(plain, own, exact, context)
    assert_close(out, own, exact, context)
    finite = exact_lse.isfinite()
    assert torch.equal(lse[~finite].double(), exact_lse[~finite]), context
    assert_close(lse[finite], own_lse[finite], exact_lse[finite], context)


@given(
    case=cases(),
    batch=st.integers(1, 3),
    queries=st.integers(1, 24),
    keys=st.integers(1, 24),
    mask=st.sampled_from((None, None, "2-D", (1, 1, 0, 0), (0, 0, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1))),
    bias=st.sampled_from((None, None, (1, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 0), (0, 1, 0, 1))),
    start=st.one_of(st.none(), st.integers(-6, 30), st.just("each")),
    lengths=st.booleans(),
    small_tiles=st.booleans(),
)
@properties
def test_attention(case, batch, queries, keys, mask, bias, start, lengths, small_tiles):
    torch.manual_seed(case.seed)
    query = case.tensor(batch, case.heads, queries, case.head_dim)
    key = case.tensor(batch, case.kv_heads, keys, case.head_dim)
    value = case.tensor(batch, case.kv_heads, keys, case.value_dim)
    full = (batch, case.heads, queries, keys)
    arguments = case.terms()
    if mask == "2-D":
        arguments["mask"] = torch.rand(batch, keys) > 0.4
    elif mask is not None:
        arguments["mask"] = torch.rand(broadcast(full, mask)) > 0.4
    if bias is not None:
        arguments["bias"] = torch.randn(broadcast(full, bias))
    arguments["query_start"] = torch.randint(-6, 30, (batch,)) if start == "each" else start
    if lengths:
        arguments["key_lengths"] = torch.randint(0, keys + 1, (batch,), dtype=torch.int32)
        absent = (torch.arange(keys) >= arguments["key_lengths"][:, None])[:, None, :, None]
        key, value = (x.masked_fill(absent, float("nan")) for x in (key, value))
    with tiles_of(3 if small_tiles else 1000, full):
        compare(query, key, value, arguments, (case, full, mask, bias, start))


@contextmanager
def tiles_of(rows: int, full: tuple[int, ...]) -> Iterator[None]:
    """At most `rows` queries a tile, as under a window or at lengths whose scores pass the byte limit."""
    row_bytes = full[0] * full[1] * full[3] * 4
    with (
        patch.object(attention_reference, "TILE_BYTES", rows * row_bytes),
        patch.object(attention_cpu, "MIN_WINDOW_ROWS", rows),
    ):
        yield


def broadcast(full: tuple[int, ...], ones: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if one else size for size, one in zip(full, ones, strict=True))


@given(
    case=cases(),
    lengths=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=5),
    start=st.one_of(st.none(), st.integers(-4, 12), st.just("each")),
    slack=st.integers(0, 40),
)
@properties
def test_varlen_attention(case, lengths, start, slack):
    torch.manual_seed(case.seed)
    bounds_q, bounds_k = (
        torch.tensor([0, *lengths_]).cumsum(0).to(torch.int32)
        for lengths_ in ([q for q, _ in lengths], [k for _, k in lengths])
    )
    query = case.tensor(1, case.heads, int(bounds_q[-1]), case.head_dim)[0].transpose(0, 1)
    key = case.tensor(1, case.kv_heads, int(bounds_k[-1]), case.head_dim)[0].transpose(0, 1)
    value = case.tensor(1, case.kv_heads, int(bounds_k[-1]), case.value_dim)[0].transpose(0, 1)
    terms = case.terms()
    starts = torch.randint(-4, 12, (len(lengths),)) if start == "each" else start
    sizes = [max((length[i] for length in lengths), default=0) + slack for i in (0, 1)]
    packed = (query, key, value, bounds_q, bounds_k, *sizes)
    plain = ops.varlen_attention(*packed, **terms, query_start=starts)
    out, lse = ops.varlen_attention(*packed, **terms, query_start=starts, return_lse=True)
    assert plain.shape == out.shape == (len(query), case.heads, case.value_dim)
    assert lse.shape == (case.heads, len(query))
    for b in range(len(lengths)):
        q0, q1, k0, k1 = *bounds_q[b : b + 2].tolist(), *bounds_k[b : b + 2].tolist()
        if q0 == q1:
            continue
        alone = [x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1])]
        arguments = terms | dict(query_start=starts if start != "each" else int(starts[b]))
        exact, exact_lse = attention_formula(*alone, torch.float64, **arguments)
        own, _ = attention_formula(*alone, case.dtype, **arguments)
        for found in (plain, out):
            assert_close(found[q0:q1].transpose(0, 1)[None], own, exact, (case, lengths, start))
        torch.testing.assert_close(lse[None, :, q0:q1].double(), exact_lse, rtol=1e-5, atol=1e-5)


@given(case=cases(), queries=st.integers(1, 6), keys=st.integers(1, 6), lengths=st.booleans())
@settings(properties, max_examples=30)
def test_gradients(case, queries, keys, lengths):
    """Of every floating-point argument, in float64, against autograd through the formula."""
    torch.manual_seed(case.seed)
    terms = case.terms() | dict(mask=torch.rand(2, keys) > 0.3)
    if lengths:
        terms["key_lengths"] = torch.randint(0, keys + 1, (2,))
    tensors = dict(
        query=torch.randn(2, case.heads, queries, 5),
        key=torch.randn(2, case.kv_heads, keys, 5),
        value=torch.randn(2, case.kv_heads, keys, 4),
        bias=torch.randn(1, case.heads, 1, keys),
        sinks=terms["sinks"],
        alibi_slopes=terms["alibi_slopes"],
        table=None if terms["relative_bias"] is None else terms["relative_bias"].table,
    )
    results = []
    for attend in (
        lambda *given_, **named: (ops.attention(*given_, **named), None),
        lambda *given_, **named: ops.attention(*given_, **named, return_lse=True),
        lambda *given_, **named: attention_formula(*given_, torch.float64, **named),
    ):
        leaves = {name: x.double().requires_grad_() for name, x in tensors.items() if x is not None}
        named = terms | {name: leaves.get(name) for name in ("bias", "sinks", "alibi_slopes")}
        if case.relative is not None:
            named["relative_bias"] = ops.RelativeBias(leaves["table"], case.relative, 12)
        out, lse = attend(leaves["query"], leaves["key"], leaves["value"], **named)
        with_lse = out.sin().sum()
        if lse is not None:
            with_lse = with_lse + lse[lse.isfinite()].cos().sum()
        plain = torch.autograd.grad(
            out.sin().sum(), leaves.values(), retain_graph=True, allow_unused=True, materialize_grads=True
        )
        whole = torch.autograd.grad(with_lse, leaves.values(), allow_unused=True, materialize_grads=True)
        results.append((plain, whole))
    (fused, _), (tiled, tiled_lse), (expected, expected_lse) = results
    for i, name in enumerate(leaves):
        for found, wanted in (
            (fused[i], expected[i]), (tiled[i], expected[i]), (tiled_lse[i], expected_lse[i])
        ):  # fmt: skip
            # NaN in the formula's own gradient: rows that see nothing, whose gradient is zero.
            wanted = wanted.nan_to_num()
            assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-6), (found - wanted, name, case)
