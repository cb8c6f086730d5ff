"""`PackedWeight`: packing is exactly invertible, rounding as near as a scheme allows, bad input is named."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastattn import ops
from fastattn.ops.int4_tiles import TILED, tiled, untiled
from fastattn.ops.packed_weight import GROUP_SIZES, SCHEMES


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 8), (64, 33)])
def test_int4_packing_is_exactly_invertible(shape):
    integers = torch.randint(0, 16, shape, dtype=torch.uint8)
    packed = ops.pack_int4(integers)
    assert packed.dtype == torch.int8 and packed.shape == (shape[0], -(-shape[1] // 2))
    assert torch.equal(ops.unpack_int4(packed, shape[1]), integers)
    # And from any bytes, where no column is left over.
    values = torch.randint(-128, 128, shape, dtype=torch.int8)
    assert torch.equal(ops.pack_int4(ops.unpack_int4(values, 2 * shape[1])), values)


@pytest.mark.parametrize(("rows", "columns"), [(64, 32), (128, 96), (192, 128)])
def test_tiles_are_a_permutation_with_an_exact_inverse(rows, columns):
    values = torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8)
    there = tiled(values, columns)
    assert there.shape == values.shape and there.is_contiguous()
    assert torch.equal(untiled(there, columns), values)
    even, odd = ops.unpack_int4(values, columns), ops.unpack_int4(there, columns)
    assert torch.equal(even.flatten().sort().values, odd.flatten().sort().values)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (5, 7), (128, 64), (3, 200)])
def test_preparing_is_exactly_invertible_and_takes_no_memory(scheme, rows, columns):
    packed = ops.quantize_absmax(torch.randn(rows, columns), scheme)
    prepared = ops.prepare(packed)
    assert prepared.nbytes == packed.nbytes
    assert torch.equal(prepared.dequantize(), packed.dequantize())
    again = ops.plain(prepared)
    assert again.layout == "plain"
    assert torch.equal(again.values.view(torch.int8), packed.values.view(torch.int8))
    assert ops.prepare(prepared).layout == prepared.layout


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("columns", [1, 31, 64, 128, 200])
def test_int4_rounds_to_the_nearest_of_sixteen(group_size, columns):
    weight = torch.randn(6, columns, dtype=torch.float64)
    packed = ops.quantize_absmax(weight, "int4-weight", group_size)
    assert packed.scales.shape == (6, -(-columns // group_size)) and packed.integers().max() <= 15
    error = (packed.dequantize(torch.float64) - weight).abs()
    step = packed.scales.abs().repeat_interleave(group_size, 1)[:, :columns]
    # Half a step; a whole one for what equals the extreme but for its sign.
    near = weight.abs() <= 7.5 * step
    assert (error[near] <= 0.5001 * step[near].double()).all()
    assert (error <= 1.0001 * step).all()


@pytest.mark.parametrize("scheme", ["int8", "int8-weight"])
def test_int8_rounds_to_the_nearest(scheme):
    weight = torch.randn(6, 50) * torch.logspace(-8, 8, 6)[:, None]
    packed = ops.quantize_absmax(weight, scheme)
    assert packed.values.abs().amax(1).eq(127).all()
    error = (packed.dequantize(torch.float64) - weight.double()).abs()
    assert (error <= 0.5001 * packed.scales.double()).all()


def test_fp8_keeps_three_bits_of_mantissa():
    weight = torch.randn(6, 50)
    packed = ops.quantize_absmax(weight, "fp8")
    error = (packed.dequantize() - weight).abs()
    assert (error <= weight.abs() / 16 + packed.scales * 2**-9).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_and_extreme_magnitudes(scheme):
    weight = torch.stack(
        [torch.zeros(64), torch.full((64,), 3e38), torch.full((64,), -1e-40), torch.ones(64)]
    )
    packed = ops.quantize_absmax(weight, scheme)
    found = packed.dequantize(torch.float64)
    torch.testing.assert_close(found, weight.double(), rtol=1e-6, atol=1e-37)
    assert torch.equal(found[0], torch.zeros(64, dtype=torch.float64))


def test_bytes_held():
    # The limits that compressed models promise, of float32's bytes.
    weight = torch.randn(768, 768)
    shares = {
        (scheme, size): ops.quantize_absmax(weight, scheme, size).nbytes / weight.nbytes
        for scheme, size in (("int8", None), ("int8-weight", None), ("int4-weight", 64), ("int4-weight", 128))
    }
    assert all(share <= (0.16 if scheme == "int4-weight" else 0.27) for (scheme, _), share in shares.items())


def test_dequantize_takes_the_input_scales_along():
    weight, scales = torch.randn(4, 8), torch.rand(8) + 0.5
    packed = replace(ops.quantize_absmax(weight * scales, "int8"), input_scales=scales)
    x = torch.randn(3, 8, dtype=torch.float64)
    through = (x / scales) @ packed.stored_weight(torch.float64).T
    torch.testing.assert_close(x @ packed.dequantize(torch.float64).T, through, rtol=1e-12, atol=1e-12)
    assert packed.to("cpu").input_scales is scales


PACKED = ops.quantize_absmax(torch.ones(4, 64), "int4-weight")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.quantize_absmax(torch.ones(4, 4), "int3"), ValueError, "'int3'; accepted are 'int8'"),
        (
            lambda: ops.quantize_absmax(torch.ones(4, 4), "int4-weight", 48),
            ValueError,
            r"48.*\(32, 64, 128\)",
        ),
        (lambda: ops.quantize_absmax(torch.ones(4, 4), "int8", 2), ValueError, "one scale a row"),
        (lambda: ops.quantize_absmax(torch.ones(4, 4).int(), "int8"), TypeError, "torch.int32"),
        (lambda: ops.quantize_absmax(torch.ones(4), "int8"), ValueError, r"\[N, K\].*got \[4\]"),
        (lambda: ops.quantize_absmax(torch.full((2, 2), torch.inf), "int8"), ValueError, "not finite"),
        (lambda: ops.pack_int4(torch.ones(2, 2)), TypeError, "torch.uint8"),
        (lambda: ops.pack_int4(torch.full((2, 2), 16, dtype=torch.uint8)), ValueError, "the largest is 16"),
        (lambda: ops.unpack_int4(torch.zeros(2, 2, dtype=torch.int8), 5), ValueError, r"\[N, 3\] for 5"),
        (lambda: replace(PACKED, scheme="int8", group_size=64), ValueError, r"must be \[N, 64\]"),
        (lambda: replace(PACKED, zero_points=None), ValueError, "needed there"),
        (lambda: replace(PACKED, scales=torch.ones(4, 2)), ValueError, r"scales must be \[4, 1\]"),
        (lambda: replace(PACKED, scales=torch.ones(4, 1).half()), TypeError, "scales must be torch.float32"),
        (lambda: replace(PACKED, values=PACKED.values.float()), TypeError, "must be torch.int8"),
        (lambda: replace(PACKED, scales=PACKED.scales.to("meta")), ValueError, "scales is on meta"),
        (lambda: replace(PACKED, layout=TILED), ValueError, "accepted are 'plain'"),
        (lambda: ops.quantize_absmax(torch.ones(2, 4), "fp8").integers(), ValueError, "no integers"),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
