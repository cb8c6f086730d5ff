"""Windows, soft cap, sinks, ALiBi, relative bias and descriptors: what drawn cases would hit only by luck."""

from __future__ import annotations

import math

import float64_reference as reference
import pytest
import torch
from attention_cases import check, check_varlen, make, run, tiles
from fastattn_kernels.attention_config import AttentionConfig
from fastattn_kernels.relative_bias import bucket_thresholds
from fastattn_kernels.relative_bias_kernel import MARGIN, bias_by_distance

SMALL = AttentionConfig(16, 16, 4, 1)
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
KINDS = [
    ("t5", 32, 128),
    ("t5-causal", 32, 128),
    ("mpnet", 32, 128),
    ("t5", 64, 256),
    ("t5", 8, 20),
    # As many buckets as leave some empty; odd; no logarithmic half.
    ("t5", 32, 11),
    ("t5", 5, 17),
    ("t5-causal", 7, 300),
    ("t5-causal", 2, 5),
    ("mpnet", 4, 9),
]


def transformers_buckets(kind: str, distance: torch.Tensor, buckets: int, max_distance: int) -> torch.Tensor:
    pytest.importorskip("transformers")
    if kind == "mpnet":
        from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

        return MPNetEncoder.relative_position_bucket(distance, buckets, max_distance)
    from transformers.models.t5.modeling_t5 import T5Attention

    return T5Attention._relative_position_bucket(distance, kind == "t5", buckets, max_distance)


@pytest.mark.parametrize(("kind", "buckets", "max_distance"), KINDS)
def test_buckets_are_those_of_transformers_at_every_distance(
    kind: str, buckets: int, max_distance: int
) -> None:
    distance = torch.arange(-2 * max_distance - 5000, 2 * max_distance + 5001)
    expected = transformers_buckets(kind, distance, buckets, max_distance)
    assert torch.equal(reference.relative_buckets(distance, kind, buckets, max_distance), expected)
    # A table that holds its own row numbers shows which row was read.
    table = torch.arange(buckets, dtype=torch.float32)[:, None].expand(buckets, 3)
    by_distance = bias_by_distance(table, kind, max_distance, 1.0)
    middle = by_distance.shape[1] // 2
    read = by_distance[:, (distance + middle).clamp(0, 2 * middle)]
    assert torch.equal(read, expected.float().expand(3, -1))
    # What attention relies on where it takes one value for a block.
    assert (by_distance[:, : MARGIN + 1] == by_distance[:, :1]).all()
    assert (by_distance[:, -MARGIN - 1 :] == by_distance[:, -1:]).all()


@pytest.mark.parametrize(
    ("kind", "buckets", "max_distance"),
    [("t5", 2, 128), ("t5", 32, 8), ("alibi", 32, 128), ("t5-causal", 1, 4)],
)
def test_buckets_that_are_none_are_refused(kind: str, buckets: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match=kind):
        bucket_thresholds(kind, buckets, max_distance)


@DTYPES
@pytest.mark.parametrize(("kind", "buckets", "max_distance"), KINDS[:3])
@pytest.mark.parametrize("start", [0, 100, -150])
def test_relative_bias_near_and_far(
    start: int, kind: str, buckets: int, max_distance: int, dtype: torch.dtype
) -> None:
    # 300 keys reach beyond the 91 positions at which a bias last changes, on both sides.
    table = torch.randn(buckets, 2)
    tensors = make(1, 2, 20, 300, 16, dtype)
    check(*tensors, query_start=start, rel_table=table, rel_kind=kind, rel_max_distance=max_distance)


def test_relative_bias_with_a_bias_is_not_scaled() -> None:
    tensors = make(1, 2, 20, 40)
    table, bias = torch.randn(40, 2)[::2][:8], torch.randn(1, 2, 20, 40)
    bias[..., 30:] = torch.finfo(torch.float32).min
    with tiles(SMALL):
        check(*tensors, rel_table=table, rel_max_distance=20, bias=bias, alibi_slopes=torch.rand(2))


@DTYPES
@pytest.mark.parametrize(
    ("causal", "left", "right"), [(True, -1, -1), (True, 10, -1), (False, 10, 3), (False, -1, 3)]
)
def test_blocks_outside_of_what_is_seen_are_not_read(
    causal: bool, left: int, right: int, dtype: torch.dtype
) -> None:
    query, key, value = make(1, 2, 16, 160, 16, dtype)
    start = 66
    low = (start - left) // 16 * 16 if left >= 0 else 0
    high = math.ceil((start + 15 + (0 if causal else right) + 1) / 16) * 16
    flags = dict(causal=causal, window_left=left, window_right=right, query_start=start)
    exact = reference.attention(query, key, value, scale=0.25, **flags)
    for tensor in (key, value):
        tensor[:, :, :low] = tensor[:, :, high:] = float("nan")
    with tiles(SMALL):
        out, lse = run(query, key, value, scale=0.25, **flags)
        packed = check_varlen_like(query, key, value, **flags)
    torch.testing.assert_close(out.double(), exact[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(lse.double(), exact[1], atol=1e-4, rtol=0)
    assert torch.equal(packed, out)


def check_varlen_like(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **flags: int
) -> torch.Tensor:
    """One sequence through the varlen kernel, as [1, H, S, D]."""
    from fastattn_kernels.attention import varlen_attention_forward

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out, _ = varlen_attention_forward(
        query=q, key=k, value=v, cu_seqlens_q=torch.tensor([0, len(q)], dtype=torch.int32),
        cu_seqlens_k=torch.tensor([0, len(k)], dtype=torch.int32), max_seqlen_q=len(q), max_seqlen_k=len(k),
        default_start=False, scale=0.25, **flags,
    )  # fmt: skip
    return out.transpose(0, 1)[None]


@DTYPES
@pytest.mark.parametrize("left", [0, 1, 15, 16, 17, 63, 200, 2**40])
def test_windows_of_every_width(left: int, dtype: torch.dtype) -> None:
    with tiles(SMALL):
        check(*make(1, 1, 40, 64, 16, dtype), causal=True, query_start=24, window_left=left)


@pytest.mark.parametrize("start", [-(2**40), -100, 100, 2**40])
def test_windows_that_hold_no_key(start: int) -> None:
    with tiles(SMALL):
        out = check(*make(2, 1, 20, 40), query_start=start, window_left=5, window_right=5)
        starts = torch.tensor([start, 10])
        check(*make(2, 1, 20, 40), query_starts=starts, window_left=5, window_right=5)
    assert not out.any()


@DTYPES
def test_soft_cap_of_scores_from_tiny_to_huge(dtype: torch.dtype) -> None:
    query, key, value = make(1, 1, 24, 48, 16, dtype)
    for factor in (1e-3, 0.1, 1.0, 20.0, 200.0):
        check(query * factor, key, value, softcap=2.0, scale=1.0)


def test_the_soft_cap_is_a_tanh_to_the_last_digits() -> None:
    # One key a query: its logsumexp is its score.
    scores = torch.cat(
        [torch.logspace(-30, 2, 500, dtype=torch.float64), torch.linspace(0.4, 0.8, 500).double()]
    )
    scores = torch.cat([scores, -scores]).float()
    query = torch.zeros(1, 1, len(scores), 16)
    query[0, 0, :, 0] = scores
    key = torch.zeros(1, 1, 1, 16)
    key[..., 0] = 1.0
    _, lse = run(query, key, key, scale=1.0, softcap=1.0)
    exact = scores.double().tanh()
    assert ((lse[0, 0].double() - exact).abs() <= 6e-7 * exact.abs()).all()


@DTYPES
def test_sinks_alone_and_with_nothing_else(dtype: torch.dtype) -> None:
    query, key, value = make(2, 3, 20, 40, 16, dtype)
    sinks = torch.tensor([0.5, float("-inf"), 80.0])
    out = check(query, key, value, sinks=sinks, key_lengths=torch.tensor([0, 40]))
    assert not out[0].any()
    # A row that sees nothing has zeros, whatever lies behind it.
    key[0], value[0] = float("nan"), float("inf")
    out, lse = run(query, key, value, sinks=sinks, mask=torch.tensor([[False], [True]]).expand(2, 40))
    assert not out[0].any() and torch.equal(lse[0], sinks[:, None].expand(3, 20))


def test_sinks_and_slopes_of_any_stride_and_dtype() -> None:
    tensors = make(1, 4, 20, 40)
    parameters = torch.randn(4, 2).to(torch.float16)
    check(*tensors, sinks=parameters[:, 0], alibi_slopes=parameters[:, 1].abs(), causal=True, query_start=20)


DESCRIBED = AttentionConfig(32, 16, 4, 1, descriptors=True)


@DTYPES
@pytest.mark.parametrize(("head_dim", "value_dim"), [(16, 16), (64, 32), (24, 40)])
def test_tensor_descriptors(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    query, key, value = make(2, 4, 50, 70, head_dim, dtype, key_heads=2, value_dim=value_dim)
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value))
    lengths = torch.tensor([0, 37])
    key[0] = value[0] = key[1, :, 37:] = value[1, :, 37:] = float("nan")
    with tiles(DESCRIBED):
        check(query, key, value, causal=True, query_start=10, key_lengths=lengths, window_left=30)
        check(query[:1, :1], key[1:, :1, :1], value[1:, :1, :1])


def test_descriptors_give_what_pointers_give() -> None:
    query, key, value = make(2, 2, 50, 70, 16, torch.float16)
    with tiles(AttentionConfig(32, 16, 4, 1)):
        expected = run(query, key, value)
    # Rows that are not contiguous, not at whole 16 bytes or shared by the batch are read by pointers.
    for arranged in (
        key,
        key.repeat_interleave(2, -1)[..., ::2],
        torch.nn.functional.pad(key, (0, 1))[..., :-1],
        torch.nn.functional.pad(key, (1, 7))[..., 1:-7],
        key.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        with tiles(DESCRIBED):
            for one, other in zip(run(query, arranged, value), expected, strict=True):
                assert torch.equal(one, other)


def test_packed_sequences_take_every_term() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(60, 2, 16, generator=generator) for _ in range(3))
    with tiles(SMALL):
        check_varlen(
            query, key, value, [25, 0, 35], [25, 0, 35], causal=True, window_left=20, softcap=3.0,
            sinks=torch.randn(2), alibi_slopes=torch.rand(2), rel_table=torch.randn(8, 2),
            rel_kind="t5-causal", rel_max_distance=20,
        )  # fmt: skip
