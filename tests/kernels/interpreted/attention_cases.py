"""What the attention tests share: tensors to attend, small tiles, and the comparison with float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import float64_reference as reference
import pytest
import torch
from fastattn_kernels import attention_plan
from fastattn_kernels.attention import attention_forward, varlen_attention_forward
from fastattn_kernels.attention_config import AttentionConfig

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
# Drawn cases that were compared, by theme.
DRAWN: Counter[str] = Counter()


def make(
    batch: int, heads: int, queries: int, keys: int, head_dim: int = 16, dtype: torch.dtype = torch.float32,
    key_heads: int | None = None, value_dim: int | None = None, seed: int = 0,
) -> Tensors:  # fmt: skip
    """query, key and value [B, H, S, D], normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    key_heads, value_dim = key_heads or heads, value_dim or head_dim
    shapes = ((heads, queries, head_dim), (key_heads, keys, head_dim), (key_heads, keys, value_dim))
    query, key, value = (torch.randn(batch, *shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


@contextmanager
def tiles(config: AttentionConfig) -> Iterator[None]:
    """Launch choices as given, so that small tensors are several tiles; descriptors where they can be."""

    def choose(*args: Any, describable: bool, **named: Any) -> AttentionConfig:
        return replace(config, descriptors=config.descriptors and describable)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "choose_attention_config", choose)
        yield


def run(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **flags: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    flags = {"scale": query.shape[-1] ** -0.5, "return_lse": True, **flags}
    return attention_forward(query=query, key=key, value=value, **flags)


def compare(
    actual: tuple[torch.Tensor, torch.Tensor], tensors: Tensors, flags: dict[str, Any], what: str = ""
) -> None:
    """out and lse by the library's rule against float64."""
    exact = reference.attention(*tensors, **flags)
    pytorch = reference.attention(*tensors, **flags, dtype=tensors[0].dtype)
    for name, one, truth, own in zip(("out", "lse"), actual, exact, pytorch, strict=True):
        reference.assert_as_exact_as_pytorch(one, truth, own, f"{what} {name}")


def check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **flags: Any) -> torch.Tensor:
    """Run the dense kernel and compare it with float64; returns out."""
    out, lse = run(query, key, value, **flags)
    flags.setdefault("scale", query.shape[-1] ** -0.5)
    seed, dropout_p = flags.pop("seed", None), flags.get("dropout_p", 0.0)
    if seed is not None and dropout_p:
        batch, heads, queries, _ = query.shape
        rows = torch.arange(batch * heads * queries).view(batch, heads, queries)
        flags["keep"] = reference.keep_mask(seed.item(), rows, key.shape[2], dropout_p)
    assert out.dtype == query.dtype and lse.dtype == torch.float32
    compare((out, lse), (query, key, value), flags)
    return out


def check_varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_lengths: list[int],
    key_lengths: list[int], slack: int = 0, **flags: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Run the varlen kernel and compare each sequence with float64; `slack`: max_seqlen less the maximum."""
    tokens, heads, head_dim = query.shape
    flags = {"scale": head_dim**-0.5, **flags}
    cu_q, cu_k = (torch.tensor([0, *accumulate(x)], dtype=torch.int32) for x in (query_lengths, key_lengths))
    out, lse = varlen_attention_forward(
        query=query, key=key, value=value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True,
        max_seqlen_q=max(query_lengths) + slack, max_seqlen_k=max(key_lengths) + slack, **flags,
    )  # fmt: skip
    assert out.is_contiguous() and out.dtype == query.dtype
    assert lse.dtype == torch.float32 and lse.shape == (heads, tokens)
    seed, starts = flags.pop("seed", None), flags.pop("query_starts", None)
    default, given = flags.pop("default_start", True), flags.pop("query_start", 0)
    ranges = zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)
    for sequence, ((q0, q1), (k0, k1)) in enumerate(ranges):
        start = given if starts is None else int(starts[sequence])
        terms = flags | {"query_start": (k1 - k0) - (q1 - q0) if default else start}
        if seed is not None and flags.get("dropout_p"):
            rows = torch.arange(heads)[:, None] * tokens + torch.arange(q0, q1)
            terms["keep"] = reference.keep_mask(int(seed), rows, k1 - k0, flags["dropout_p"])[None]
        parts = [x[None].transpose(1, 2) for x in (query[q0:q1], key[k0:k1], value[k0:k1])]
        actual = out[q0:q1].transpose(0, 1)[None], lse[:, q0:q1][None]
        compare(actual, (parts[0], parts[1], parts[2]), terms, f"sequence {sequence}")
    return out, lse
