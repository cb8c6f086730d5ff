"""Decode attention in the interpreter against float64, forced into many splits of few keys."""

from __future__ import annotations

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
@given(
    # The interpreter takes milliseconds a program: few rows, but up to two blocks of them.
    decode_cases((torch.float16, torch.float32), batch=2, rows=20, capacity=64),
    st.integers(1, 5),
    st.sampled_from(("sm_80", "sm_90")),
)
def test_every_combination(case: DecodeCase, num_splits: int, architecture: str) -> None:
    check(case, num_splits, architecture=architecture)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_every_fp8_number_is_converted_exactly(dtype: torch.dtype, architecture: str) -> None:
    # One key, so the output is its value: all 256 bytes.
    value = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 256).view(FP8)
    if architecture == "sm_90":
        # But NaN, of which the interpreter's imitation of the instruction makes a number.
        value = value.float().nan_to_num().to(FP8)
    query, key = torch.zeros(1, 1, 1, 16, dtype=dtype), torch.zeros(1, 1, 1, 16).to(FP8)
    out, scale = torch.full((1, 1, 1, 256), 7.0, dtype=dtype), torch.ones(1)
    (launch,) = plan_decode_attention(
        query, key, value, out, None, torch.tensor([1]), key_scale=scale, value_scale=scale,
        architecture=architecture,
    )  # fmt: skip
    launch.run(out.device)
    torch.testing.assert_close(out, value.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_the_number_of_splits_changes_nothing_but_rounding() -> None:
    case = replace(PLAIN, lengths=(70, 0, 17), key_heads=1, sinks=True, window=40)
    whole, whole_lse = check(case, 1)
    for num_splits in (2, 3, 9):
        out, lse = check(case, num_splits)
        torch.testing.assert_close(out, whole)
        torch.testing.assert_close(lse, whole_lse)
        again, _ = run(case, num_splits)
        assert torch.equal(again, out), "a repeat must be bit-identical"


def test_more_splits_than_the_reduction_takes_at_a_time() -> None:
    # ALiBi favours the last keys, so that later splits raise the maximum of earlier ones.
    check(replace(PLAIN, lengths=(330,), capacity=330, key_heads=1, group=2, alibi=True), 21)


@pytest.mark.parametrize("relative", ["t5", "t5-causal", "mpnet"])
def test_far_keys_share_a_bucket_from_the_right_distance_on(relative: str) -> None:
    # Every offset of a block of 16 keys to the query, and so to where the last bucket begins.
    lengths = tuple(range(17, 49))
    check(replace(PLAIN, lengths=lengths, capacity=48, key_heads=1, group=1, relative=relative), 1)


def test_lengths_shorter_than_the_cache_are_split_as_finely() -> None:
    # 64 of 4096 keys: each of four splits has one block of 16, instead of the first having all.
    case = replace(PLAIN, lengths=(64,), capacity=4096, key_heads=1, group=1)
    arguments = arguments_of(case)
    out = torch.zeros(1, 1, 1, 16)
    launch, _ = plan_decode_attention(
        **arguments, out=out, lse=None, architecture="sm_80", config=SMALL, num_splits=4
    )
    part_lse = launch.arguments["lse"].fill_(torch.nan)
    launch.run(out.device)
    assert part_lse.isfinite().all()


def test_chosen_launches_are_right_at_the_lengths_they_are_for() -> None:
    # Nothing forced: the tiles and splits that a user's call gets.
    case = replace(PLAIN, lengths=(300, 120), capacity=320, key_heads=1, dtype=torch.float16, head_dim=128)
    for variant in (case, replace(case, block_size=64), replace(case, block_size=16, queries=6)):
        arguments = arguments_of(variant)
        out, lse = decode_attention_forward(**arguments, return_lse=True)
        exact, own = variant.expected(torch.float64), variant.expected(torch.float16)
        reference.assert_as_exact_as_pytorch(out, exact[0], own[0], f"out of {variant}")
        reference.assert_as_exact_as_pytorch(lse, exact[1], own[1], f"lse of {variant}")
        assert out.transpose(1, 2).is_contiguous()
        plain, no_lse = decode_attention_forward(**arguments)
        assert torch.equal(plain, out) and no_lse.shape == (0,)


def test_offsets_past_32_bits() -> None:
    keys, apart = 18, 2**27
    try:
        # 2.4 GB of addresses, of which the rows below are the only ones ever touched.
        storage = torch.empty(keys * apart, dtype=INT8)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of 2**31 elements: {error}")
    case = replace(PLAIN, lengths=(keys,), capacity=keys, key_heads=1, cache_dtype=INT8)
    expected, _ = run(case, 2)
    arguments, out = arguments_of(case), torch.empty_like(expected)
    near = arguments["key_cache"]
    contiguous = storage.as_strided(near.shape, (0, 0, apart, 1)).copy_(near)
    pages = storage.as_strided((keys // 2, 2, 1, 16), (2 * apart, apart, 16, 1))
    table = torch.arange(keys // 2)[None]
    value_pages = arguments["value_cache"].view(keys // 2, 2, 1, 16)
    for changes in (
        dict(key_cache=contiguous),
        dict(key_cache=pages, value_cache=value_pages, block_table=table),
    ):
        launches = plan_decode_attention(
            **arguments | changes, out=out.fill_(torch.nan), lse=None, architecture="sm_80", config=SMALL,
            num_splits=2,
        )  # fmt: skip
        for launch in launches:
            launch.run(out.device)
        assert torch.equal(out, expected), list(changes)


@pytest.mark.parametrize(("batch", "value_dim"), [(0, 16), (2, 0)])
def test_nothing_to_do(batch: int, value_dim: int) -> None:
    query, key = torch.zeros(batch, 2, 1, 16), torch.zeros(batch, 2, 5, 16)
    lengths = torch.zeros(batch, dtype=torch.int32)
    out, lse = decode_attention_forward(query, key, key[..., :value_dim], lengths, return_lse=True)
    assert out.shape == (batch, 2, 1, value_dim) and (lse == -torch.inf).all()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [(257, torch.float32, "at most 256"), (16, torch.float64, "float16, bfloat16 and float32")],
)
def test_what_the_kernel_cannot_do_is_refused(head_dim: int, dtype: torch.dtype, message: str) -> None:
    query, key = torch.zeros(1, 1, 1, head_dim, dtype=dtype), torch.zeros(1, 1, 4, head_dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        decode_attention_forward(query, key, key, torch.tensor([4]))


def test_the_operation_runs_the_kernel() -> None:
    import fastattn

    tensors = replace(PLAIN, cache_dtype=INT8, block_size=16, relative="t5", sinks=True).tensors
    table, kind, distance = tensors["relative"]
    names = ("query", "key_cache", "value_cache", "cache_lengths", "block_table")
    keywords = {name: tensors[name] for name in ("key_scale", "value_scale", "sinks")}
    keywords["relative_bias"] = fastattn.ops.RelativeBias(table, kind, distance)
    expected = fastattn.ops.decode_attention(*(tensors[name] for name in names), window=30, **keywords)
    with fastattn.set_backend("triton"):
        found = fastattn.ops.decode_attention(*(tensors[name] for name in names), window=30, **keywords)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, expected), "both ran the same code"
