"""Dense attention in the interpreter against float64. Not bfloat16: the interpreter's dot of it is wrong."""

from __future__ import annotations

import pytest
import torch
from attention_cases import check, make, run, tiles
from fastattn_kernels._dropout import dropout_constants
from fastattn_kernels.aot import compile_launch
from fastattn_kernels.attention_config import AttentionConfig
from fastattn_kernels.attention_plan import plan_attention

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
FP16_MINIMUM = torch.finfo(torch.float16).min
FP32_MINIMUM = torch.finfo(torch.float32).min


# Around the tile sizes (128 queries, 32 or 64 keys): one, less than a tile, whole tiles, one more than a
# tile, several.
LENGTHS = [(1, 1), (1, 70), (129, 128), (5, 200), (150, 37)]


@DTYPES
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
def test_lengths(queries: int, keys: int, causal: bool, dtype: torch.dtype) -> None:
    check(*make(1, 2, queries, keys, 32, dtype), causal=causal, query_start=keys - queries)


@DTYPES
@pytest.mark.parametrize(
    ("head_dim", "value_dim"),
    # Sizes models have, odd ones, values wider and narrower than keys, and under a dot's 16.
    [(80, 80), (65, 33), (96, 160), (192, 128), (251, 256), (256, 16), (1, 3)],
)
def test_head_sizes(head_dim: int, value_dim: int, dtype: torch.dtype) -> None:
    check(*make(1, 2, 20, 70, head_dim, dtype, value_dim=value_dim), causal=True, query_start=50)


def padding(lengths: list[int], keys: int, side: str) -> torch.Tensor:
    positions = torch.arange(keys)
    counts = torch.tensor(lengths)[:, None]
    return positions < counts if side == "right" else positions >= keys - counts


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_padding_mask(side: str, causal: bool) -> None:
    mask = padding([70, 1, 40, 0], 70, side)
    out = check(*make(4, 1, 70, 70, 16, torch.float16), mask=mask, causal=causal)
    assert not out[3].any(), "an all-padding row must be zeros"


@DTYPES
def test_padding_mask_where_batch_equals_length(dtype: torch.dtype) -> None:
    # [B, Sk] is then as square as [Sq, Sk]: the two must not be confused.
    check(*make(6, 2, 6, 6, 16, dtype), mask=padding([6, 5, 4, 3, 2, 1], 6, "right"))


def test_masks_and_biases_of_any_stride() -> None:
    tensors = make(2, 2, 20, 70, dtype=torch.float16)
    generator = torch.Generator().manual_seed(1)
    wide = torch.rand(2, 2, 40, 140, generator=generator)
    transposed = torch.rand(70, 20, generator=generator).T[None, None]
    column = torch.rand(2, 1, 20, 1, generator=generator).expand(2, 2, 20, 70)
    for scores in (wide[:, :, ::2, 1::2], transposed, column):
        check(*tensors, mask=scores > 0.5)
        check(*tensors, bias=scores)
    check(*tensors, mask=(torch.rand(70, 2, generator=generator) > 0.5).T)


def test_mask_and_bias_are_read_in_place() -> None:
    query, key, value = make(3, 4, 20, 70)
    mask, bias = torch.ones(3, 70, dtype=torch.bool), torch.zeros(1, 4, 1, 70)
    launch = plan_attention(
        query=query, key=key, value=value, out=torch.empty_like(query), lse=None, mask=mask, bias=bias,
        scale=1.0, architecture="sm_80",
    )  # fmt: skip
    arguments = launch.arguments
    assert arguments["mask"].data_ptr() == mask.data_ptr() and arguments["bias"].data_ptr() == bias.data_ptr()
    assert [arguments[f"stride_m{axis}"] for axis in "bhmn"] == [70, 0, 0, 1]
    assert [arguments[f"stride_b{axis}"] for axis in "bhmn"] == [0, 70, 0, 1]
    assert not arguments["MASK_PER_QUERY"] and not arguments["BIAS_PER_QUERY"]


@DTYPES
def test_large_and_infinite_bias(dtype: torch.dtype) -> None:
    query, key, value = make(1, 1, 6, 70, 16, dtype)
    bias = torch.zeros(1, 1, 6, 70)
    bias[..., 0, 30:] = float("-inf")
    bias[..., 1, :] = float("-inf")  # nothing to attend: zeros
    bias[..., 2, :] = FP32_MINIMUM  # every key equally bad, so as models mask with it: the mean of the values
    bias[..., 3, 30:] = FP32_MINIMUM
    bias[..., 4, 33] = 1e30
    bias[..., 5, :] = FP16_MINIMUM
    out = check(query, key, value, bias=bias)
    assert not out[0, 0, 1].any()
    torch.testing.assert_close(out[0, 0, 2].float(), value[0, 0].float().mean(0), rtol=0, atol=1e-3)
    head = run(query[:, :, 3:4], key[:, :, :30], value[:, :, :30])[0][0, 0, 0]
    torch.testing.assert_close(out[0, 0, 3], head, rtol=0, atol=2e-3)
    torch.testing.assert_close(out[0, 0, 4], value[0, 0, 33])


@pytest.mark.parametrize("query_start", [0, 5, -7, 65, -1000, 1000, 2**40, -(2**40)])
def test_causal_from_any_query_start(query_start: int) -> None:
    check(*make(1, 1, 70, 70, 16, torch.float16), causal=True, query_start=query_start)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_causal_from_a_start_per_sequence(integers: torch.dtype) -> None:
    dtype = torch.float16
    starts = torch.tensor([0, 7, -3, -40, 500], dtype=integers)
    check(*make(5, 1, 20, 70, 16, dtype), causal=True, query_starts=starts)
    # The per-sequence starts win over the number, and every other element of a tensor is as good as a tensor.
    strided = starts.repeat_interleave(2)[::2]
    check(*make(5, 1, 20, 70, 16, dtype), causal=True, query_starts=strided, query_start=3)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_key_lengths_hide_what_lies_past_them(causal: bool, integers: torch.dtype) -> None:
    query, key, value = make(5, 1, 30, 140, 16, torch.float16)
    lengths = torch.tensor([0, 1, 64, 140, 200], dtype=integers)
    for sequence, length in enumerate(lengths.tolist()):
        key[sequence, :, length:] = float("nan")
        value[sequence, :, length:] = float("nan")
    out = check(query, key, value, key_lengths=lengths, causal=causal, query_start=50)
    assert out.isfinite().all() and not out[0].any()


def test_a_masked_row_is_zeros_whatever_the_values_hold() -> None:
    query, key, value = make(2, 1, 8, 40)
    key[0], value[0] = float("nan"), float("inf")
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0] = False
    out, lse = run(query, key, value, mask=mask)
    assert not out[0].any() and (lse[0] == float("-inf")).all() and out.isfinite().all()


def test_any_strides() -> None:
    query, key, value = make(2, 4, 20, 70, 24, torch.float16, key_heads=2)
    expected, _ = run(query, key, value)

    def sequence_major(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def every_other(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(2, -1)[..., ::2]

    def feature_major(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    for arrange in (sequence_major, every_other, feature_major):
        out, _ = run(arrange(query), arrange(key), arrange(value))
        assert torch.equal(out, expected), arrange.__name__
    shared = key[:1].expand(2, -1, -1, -1)
    assert torch.equal(run(query, shared, value)[0], run(query, shared.contiguous(), value)[0])


def test_offsets_past_32_bits() -> None:
    keys, apart = 18, 2**27
    # Not poisoned: that would touch every page of what follows.
    torch.use_deterministic_algorithms(False)
    try:
        # 5 GB of addresses, of which the rows below are the only ones ever touched.
        storage = torch.empty(keys * apart, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space for a tensor of 2**31 elements: {error}")
    query, key, value = make(1, 1, 20, keys, 16, torch.float16)
    far = storage.as_strided((1, 1, keys, 16), (0, 0, apart, 1)).copy_(key)
    assert torch.equal(run(query, far, value)[0], run(query, key, value)[0])
    assert torch.equal(run(query, key, far)[0], run(query, key, key)[0])
    assert torch.equal(run(far, key, value)[0], run(key, key, value)[0])
    bias = storage.as_strided((1, 1, 20, keys), (0, 0, 1, apart)).copy_(torch.randn(20, keys))
    assert torch.equal(
        run(query, key, value, bias=bias)[0], run(query, key, value, bias=bias.contiguous())[0]
    )


def test_output_is_laid_out_by_position() -> None:
    out, lse = run(*make(2, 3, 5, 7))
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert run(*make(2, 3, 5, 7), return_lse=False)[1].shape == (0,)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1, -(2**63), -5])
def test_dropout_is_the_formula_s(seed: int) -> None:
    tensors = make(2, 2, 20, 140, 16, torch.float16)
    check(*tensors, dropout_p=0.3, seed=torch.tensor([seed]), causal=True, query_start=100)


def test_dropout_keeps_lse_and_repeats() -> None:
    tensors = make(1, 2, 20, 140, dtype=torch.float16)
    # The same tiles throughout: what is launched with dropout may be another choice.
    with tiles(AttentionConfig(32, 64, 4, 1)):
        plain, plain_lse = run(*tensors)
        first, lse = run(*tensors, dropout_p=0.3, seed=torch.tensor([7]))
        again, _ = run(*tensors, dropout_p=0.3, seed=torch.tensor([7]))
        other, _ = run(*tensors, dropout_p=0.3, seed=torch.tensor([8]))
        everything, _ = run(*tensors, dropout_p=1.0, seed=torch.tensor([7]))
        nothing, _ = run(*tensors, dropout_p=0.0, seed=torch.tensor([7]))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(lse, plain_lse)
    assert not everything.any() and dropout_constants(1.0)[1] == 0.0
    assert torch.equal(nothing, plain)


def test_dropout_drops_the_share_asked_for() -> None:
    # One-hot values of equal scores make the weights visible.
    keys = 256
    query, key = (torch.zeros(1, 4, length, 16, dtype=torch.float16) for length in (64, keys))
    values = torch.eye(keys, dtype=torch.float16).expand(1, 4, keys, keys)
    out, _ = run(query, key, values, dropout_p=0.25, seed=torch.tensor([3]))
    kept = out != 0
    # Standard deviation of the share over 65536 draws: 0.0017.
    assert abs(kept.float().mean().item() - 0.75) < 0.007
    torch.testing.assert_close(out[kept], torch.full_like(out[kept], 1 / (keys * 0.75)), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
def test_nothing_to_do(batch: int, queries: int, keys: int) -> None:
    out, lse = run(*make(batch, 2, queries, keys), causal=True)
    assert out.shape == (batch, 2, queries, 16) and not out.any()
    assert lse.shape == (batch, 2, queries) and (lse == float("-inf")).all()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [(257, torch.float32, "at most 256"), (16, torch.float64, "float16, bfloat16 and float32")],
)
def test_what_the_kernel_cannot_do_is_refused(head_dim: int, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(*make(1, 1, 4, 4, head_dim, dtype))


def test_compiling_ahead_of_time_needs_the_compiler() -> None:
    query, _, _ = make(1, 1, 4, 4)
    launch = plan_attention(
        query=query, key=query, value=query, out=query, lse=None, scale=1.0, architecture="sm_90"
    )
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_launch(launch, "sm_90")
