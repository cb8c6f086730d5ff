"""Decode attention in the interpreter against float64, forced into many splits of few keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import float64_reference as reference
import pytest
import torch
from decode_cases import FP8, INT8, DecodeCase, decode_cases
from fastattn_kernels.decode import decode_attention_forward, plan_decode_attention
from fastattn_kernels.decode_config import DecodeConfig
from hypothesis import given, settings
from hypothesis import strategies as st

# Blocks of 16 keys: a page of 16, 32 or 64 takes the way of one page a block, others that of one a key.
SMALL = DecodeConfig(block_m=16, block_n=16, num_warps=4, num_stages=1, occupancy=1)
PLAIN = DecodeCase(
    seed=0, dtype=torch.float32, cache_dtype=None, lengths=(70, 33), capacity=70, queries=1, key_heads=2,
    group=3, head_dim=16, value_dim=16, block_size=0, layout="plain", window=-1, scale=0.25, softcap=0.0,
    sinks=False, alibi=False, relative=None,
)  # fmt: skip


def arguments_of(case: DecodeCase) -> dict[str, Any]:
    """The case as the kernel package takes it."""
    names = ("query", "key_cache", "value_cache", "cache_lengths", "block_table", "key_scale", "value_scale")
    arguments = {name: case.tensors[name] for name in (*names, "alibi_slopes", "sinks")}
    if case.tensors["relative"] is not None:
        table, kind, max_distance = case.tensors["relative"]
        arguments |= dict(rel_table=table, rel_kind=kind, rel_max_distance=max_distance)
    return arguments | dict(window_left=case.window, scale=case.scale, softcap=case.softcap)


def run(
    case: DecodeCase, num_splits: int | None = None, config: DecodeConfig = SMALL, architecture: str = "sm_80"
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of the planned launches; whatever these do not write stays NaN."""
    batch = len(case.lengths)
    out = torch.full((batch, case.queries, case.heads, case.value_dim), torch.nan, dtype=case.dtype)
    out, lse = out.transpose(1, 2), torch.full((batch, case.heads, case.queries), torch.nan)
    launches = plan_decode_attention(
        **arguments_of(case),
        out=out,
        lse=lse,
        architecture=architecture,
        config=config,
        num_splits=num_splits,
    )
    assert len(launches) == (1 if num_splits == 1 else 2)
    for name in ("out", "lse"):
        # The parts between kernel and reduction, where there are any.
        launches[0].arguments[name].fill_(torch.nan)
    for launch in launches:
        launch.run(out.device)
    return out, lse


def check(case: DecodeCase, num_splits: int, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    found = run(case, num_splits, **how)
    exact, pytorch = case.expected(torch.float64), case.expected(case.dtype)
    for name, actual, truth, own in zip(("out", "lse"), found, exact, pytorch, strict=True):
        reference.assert_as_exact_as_pytorch(actual, truth, own, f"{name} of {case}, {num_splits} splits")
    return found


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(decode_cases((torch.float16, torch.float32)), st.integers(1, 7), st.sampled_from(("sm_80", "sm_90")))
def test_every_combination(case: DecodeCase, num_splits: int, architecture: str) -> None:
    check(case, num_splits, architecture=architecture)
