"""The steps of the decode kernels: where a sequence's keys lie, what a quantized cache holds, score terms."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_relative_bias", "add_sink", "dequantize", "locate_keys", "row_offsets", "split_keys"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def split_keys(length, queries, window_left, num_splits, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first key that any of the last `queries` positions sees, where splits begin, and how long each is.

    What is there is divided, not what the cache could hold: splits are equally long at every length, and
    those that rounding up to BLOCK_N leaves without keys are the last.
    """
    first_key = 0
    if WINDOW:
        first_key = tl.maximum(length - queries - window_left, 0)
    # On a multiple of BLOCK_N a block of keys never straddles two pages of a multiple's size.
    begin = first_key // BLOCK_N * BLOCK_N
    chunk = tl.cdiv(tl.cdiv(tl.maximum(length - begin, 0), num_splits), BLOCK_N) * BLOCK_N
    return first_key, begin, chunk


@triton.jit
def locate_keys(start, keys_valid, pages, PAGE_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The page of keys [start, start + BLOCK_N) and their rows in it; `pages` is where the sequence's begin.

    PAGE_SIZE 0 is a contiguous cache, which has page 0 only.
    """
    keys = start + tl.arange(0, BLOCK_N)
    if PAGE_SIZE == 0:
        page = tl.zeros([BLOCK_N], tl.int64)
        row = keys
    elif PAGE_SIZE % BLOCK_N == 0:
        page = tl.load(pages + start // PAGE_SIZE).to(tl.int64) + tl.zeros([BLOCK_N], tl.int64)
        row = start % PAGE_SIZE + tl.arange(0, BLOCK_N)
    else:
        page = tl.load(pages + keys // PAGE_SIZE, mask=keys_valid, other=0).to(tl.int64)
        row = keys % PAGE_SIZE
    return page, row


@triton.jit
def row_offsets(page, row, stride_b, stride_n, PAGE_SIZE: tl.constexpr):
    """int64 offsets of key rows. A cache may well be larger than 2**31 elements."""
    offsets = row.to(tl.int64) * stride_n
    if PAGE_SIZE != 0:
        offsets += page * stride_b
    return offsets


@triton.jit
def dequantize(tile, FP8: tl.constexpr, dtype: tl.constexpr):
    """A cache tile as `dtype`, without its scale. FP8: uint8 that hold float8_e4m3fn, converted by the GPU's
    "instruction" or, where it has none, by moving "bits".

    e4m3's exponent bias is 7 and float16's 15: its bits, moved to float16's places, are 2**-8 of the number,
    subnormal ones included. Only its NaN, all ones, would become a number.
    """
    if FP8 == "instruction":
        return tile.to(tl.float8e4nv, bitcast=True).to(dtype)
    elif FP8 == "bits":
        bits = tile.to(tl.int16)
        magnitude = tl.where((bits & 0x7F) == 0x7F, 0x7E00, (bits & 0x7F) << 7)
        half = (((bits & 0x80) << 8) | magnitude).to(tl.int16).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)
    else:
        return tile.to(dtype)


@triton.jit
def add_relative_bias(
    scores, steps, nearest, table, columns, stride_bucket, EXACT: tl.constexpr, THRESHOLDS: tl.constexpr
):
    """Add the bias of keys `steps` before each row's query, by the buckets of relative_bias.py.

    `columns` is where each row's head begins in the table, `nearest` the fewest steps of the tile: far keys,
    most of a long cache, share the last bucket.
    """
    FARTHEST: tl.constexpr = THRESHOLDS[-1] if len(THRESHOLDS) > 0 else EXACT
    if nearest >= FARTHEST:
        last = tl.load(table + columns + (EXACT + len(THRESHOLDS)) * stride_bucket)
        scores += last.to(tl.float32)[:, None]
    else:
        # Keys after the query are hidden afterwards; theirs may be any bucket that exists.
        bucket = tl.minimum(tl.maximum(steps, 0), EXACT)
        for index in tl.static_range(len(THRESHOLDS)):
            bucket += (steps >= THRESHOLDS[index]).to(tl.int32)
        scores += tl.load(table + (columns[:, None] + bucket * stride_bucket)).to(tl.float32)
    return scores


@triton.jit
def add_sink(maximum, total, sink):
    """Fold one more logit a row into the running maximum and sum; gives the factor of earlier sums, too."""
    new_maximum = tl.maximum(maximum, sink)
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    rescale = tl.math.exp2((maximum - shift) * LOG2E)
    return rescale, new_maximum, total * rescale + tl.math.exp2((sink - shift) * LOG2E)
