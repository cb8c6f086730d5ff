"""Symmetric quantization of float32 rows to int8 or fp8 (e4m3fn), inside the kernels that make them.

fp8 is made by integer arithmetic: sm_80 has no instruction for it, gfx942's is another format, and one way
gives the same bits on every GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__: list[str] = []


@triton.jit
def largest_magnitude(x, AXIS: tl.constexpr):
    """The largest |x| along an axis, as int32 bits: these order as the numbers do, with NaN above all."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)


@triton.jit
def scale_of_magnitude(magnitude, QUANTIZE: tl.constexpr):
    """The scale that takes the largest magnitude to the end of the dtype's range.

    1 where it would be zero or subnormal, whose inverse overflows: such a row is zeros.
    """
    largest: tl.constexpr = 127.0 if QUANTIZE == "int8" else 448.0
    scale = tl.div_rn(magnitude.to(tl.float32, bitcast=True), largest)
    return tl.where(scale < 1.1754943508222875e-38, 1.0, scale)


@triton.jit
def quantized(x, scale, QUANTIZE: tl.constexpr):
    """x / scale as int8, or as the uint8 bits of fp8: to nearest, halves to even, saturating."""
    # Of a scale of 1 the inverse must be 1: `/` is off by an ulp or two on a GPU.
    scaled = x * tl.div_rn(1.0, scale)
    if QUANTIZE == "int8":
        scaled = tl.minimum(tl.maximum(scaled, -127.0), 127.0)
        # At 1.5 * 2**23 float32 is 1 apart: the addition rounds.
        return ((scaled + 12582912.0) - 12582912.0).to(tl.int8)
    else:
        sign = (scaled.to(tl.int32, bitcast=True) >> 24) & 0x80
        magnitude = tl.minimum(tl.abs(scaled), 448.0)
        bits = magnitude.to(tl.int32, bitcast=True)
        # Of 23 bits of mantissa 3 stay, and of the exponent's bias of 127, 7.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below 2**-6 steps are 2**-9, as float32's at 2**14: the addition rounds.
        subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) & 0xF
        return (tl.where(magnitude < 0.015625, subnormal, normal) | sign).to(tl.uint8)
