"""Packed sequences in the interpreter, each against the float64 reference of that sequence alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import check_varlen
from fastattn_kernels.attention import varlen_attention_forward

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])


def check(
    query_lengths: list[int], key_lengths: list[int], heads: int = 2, key_heads: int = 2, head_dim: int = 16,
    value_dim: int | None = None, dtype: torch.dtype = torch.float32, pack: bool = True, **flags: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Random sequences through the kernel, each compared with float64."""
    generator = torch.Generator().manual_seed(sum(query_lengths) + head_dim)
    tokens, keys = sum(query_lengths), sum(key_lengths)
    query = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    key = torch.randn(keys, key_heads, head_dim, generator=generator).to(dtype)
    value = torch.randn(keys, key_heads, value_dim or head_dim, generator=generator).to(dtype)
    if not pack:
        # As the three parts of one projection arrive.
        query, key, value = torch.stack([query, key, value], 1).unbind(1)
    return check_varlen(query, key, value, query_lengths, key_lengths, **flags)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(
    ("query_lengths", "key_lengths"),
    [
        ([5, 130, 1, 64], [5, 130, 1, 64]),
        ([7], [7]),
        # Sequences without queries, without keys, without either.
        ([5, 0, 3, 0, 4], [6, 9, 0, 0, 70]),
        # Cross attention: more queries than keys and fewer.
        ([20, 3, 150], [4, 130, 33]),
        # As padding-free execution packs: real tokens, and one query where a sequence is padding only.
        ([17, 1, 40], [17, 0, 40]),
    ],
)
def test_sequences_do_not_see_each_other(
    query_lengths: list[int], key_lengths: list[int], causal: bool
) -> None:
    check(query_lengths, key_lengths, causal=causal, dtype=torch.float16)


@DTYPES
def test_grouped_heads_and_odd_head_sizes(dtype: torch.dtype) -> None:
    check([9, 33], [40, 33], heads=6, key_heads=2, head_dim=20, value_dim=33, causal=True, dtype=dtype)


def test_views_of_one_projection() -> None:
    check([9, 33], [9, 33], causal=True, pack=False)


@pytest.mark.parametrize("slack", [1, 500])
def test_max_seqlen_is_only_a_bound(slack: int) -> None:
    lengths = [5, 64, 1]
    out, lse = check(lengths, lengths, causal=True, slack=slack)
    exact, exact_lse = check(lengths, lengths, causal=True)
    assert torch.equal(out, exact) and torch.equal(lse, exact_lse)


@pytest.mark.parametrize("query_start", [0, 3, -2, 2**40])
def test_given_query_start(query_start: int) -> None:
    check([9, 0, 33], [40, 5, 33], causal=True, default_start=False, query_start=query_start)


def test_a_query_start_per_sequence() -> None:
    starts = torch.tensor([30, 2, -5])
    check([9, 0, 33], [40, 5, 33], causal=True, default_start=False, query_starts=starts)


def test_dropout_counts_packed_rows() -> None:
    dtype = torch.float16
    check(
        [9, 130, 33], [9, 130, 33], causal=True, dropout_p=0.2, seed=torch.tensor([2**40 + 17]), dtype=dtype
    )


@pytest.mark.parametrize("sequences", [0, 2])
def test_no_tokens(sequences: int) -> None:
    nothing, cu_seqlens = torch.zeros(0, 2, 16), torch.zeros(sequences + 1, dtype=torch.int32)
    out, lse = varlen_attention_forward(
        query=nothing, key=nothing, value=nothing, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens,
        max_seqlen_q=0, max_seqlen_k=0, scale=1.0, return_lse=True,
    )  # fmt: skip
    assert out.shape == (0, 2, 16) and lse.shape == (2, 0)
