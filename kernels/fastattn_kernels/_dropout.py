"""Counter-based dropout, shared by the kernels: the mask is a function of (seed, row, column), never stored.

The mixer is lowbias32 (C. Wellons, "Prospecting for Hash Functions", 2018). The library's PyTorch reference
computes the same bits, so that a backward pass can make the forward's mask again.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dropout_constants"]


def dropout_constants(probability: float) -> tuple[int, float]:
    """A dropout probability for the kernels: the bits below which an element goes, the scale of what stays.

    A probability of 1 drops everything. Its threshold, 2**32, has no uint32; the scale of 0 does it instead.
    """
    if probability >= 1.0:
        return 2**32 - 1, 0.0
    return int(probability * 2**32), 1.0 / (1.0 - probability)


@triton.jit
def lowbias32(x):
    """Mix 32 bits; `x` is uint32 and the products wrap."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


@triton.jit
def dropout_row_key(seed_pointer, row):
    """The uint32 key of each int64 `row` under the int64 seed at `seed_pointer`."""
    seed = tl.load(seed_pointer)
    seed_low = (seed & 0xFFFFFFFF).to(tl.uint32)
    seed_high = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    row_low = (row & 0xFFFFFFFF).to(tl.uint32)
    row_high = ((row >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return lowbias32(lowbias32(seed_low ^ row_low) + seed_high + row_high)


@triton.jit
def dropout_keep(row_key, column, threshold):
    """Whether an element stays; `row_key` and the int32 `column` broadcast."""
    return lowbias32(row_key ^ column.to(tl.uint32)) >= threshold.to(tl.uint32)
