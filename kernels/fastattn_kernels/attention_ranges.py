"""Which key blocks a tile of queries has to visit: where its sequence lies and what it may see."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["block_edges", "sequence_of", "visible_offsets"]

# Farther than any length: sums of two stay within 32 bits, and nothing beyond it changes what is seen.
FAR = tl.constexpr(2**29)


@triton.jit
def sequence_of(cu_seqlens, batch, length, VARLEN: tl.constexpr):
    """Where the batch entry's rows begin (int64) and how many there are (int32)."""
    begin = tl.zeros([], tl.int64)
    count = length
    if VARLEN:
        begin = tl.load(cu_seqlens + batch).to(tl.int64)
        count = (tl.load(cu_seqlens + batch + 1) - begin).to(tl.int32)
    return begin, count


@triton.jit
def visible_offsets(
    query_start, query_starts, default, batch, window_left, window_right, DEFAULT_START: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """(start, left, right): query i stands at key i + start and sees keys [i + left, i + right]."""
    if DEFAULT_START:
        start = default
    elif query_starts is not None:
        start = tl.minimum(tl.maximum(tl.load(query_starts + batch), -FAR), FAR).to(tl.int32)
    else:
        start = query_start
    left = start
    right = start
    if HAS_LEFT:
        left = tl.maximum(start - window_left, -FAR)
    if HAS_RIGHT:
        right = tl.minimum(start + window_right, FAR)
    return start, left, right


@triton.jit
def block_edges(
    first, last, left, right, key_count, near_left, near_right, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Six edges, in order, between which key blocks are alike for queries first to last.

    Keys outside of the outermost two none of them sees; blocks between the second and the fifth all of them
    see whole. Between the third and the fourth are those of these blocks that reach into
    [near_left, near_right): all, where that is None.
    """
    begin = 0
    whole_begin = 0
    whole_end = key_count
    end = key_count
    if HAS_LEFT:
        begin = tl.minimum(tl.maximum(first + left, 0), key_count) // BLOCK_N * BLOCK_N
        whole_begin = tl.cdiv(tl.minimum(tl.maximum(last + left, 0), key_count), BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        whole_end = tl.minimum(tl.maximum(first + right + 1, 0), key_count)
        end = tl.minimum(tl.maximum(last + right + 1, 0), key_count)
    # A loop from an edge that is no multiple of BLOCK_N, as `end` may be, is empty. The compiler has to know
    # that of the others, or it reads masks and biases by single elements.
    if HAS_LEFT:
        begin = tl.multiple_of(begin, BLOCK_N)
        whole_begin = tl.multiple_of(tl.minimum(whole_begin, end), BLOCK_N)
    whole_end = tl.multiple_of(tl.maximum(whole_begin, whole_end // BLOCK_N * BLOCK_N), BLOCK_N)
    near_begin = whole_begin
    near_end = whole_end
    if near_left is not None:
        near_begin = tl.maximum(near_begin, tl.minimum(near_left, whole_end) // BLOCK_N * BLOCK_N)
        near_end = tl.minimum(tl.cdiv(tl.maximum(near_right, near_begin), BLOCK_N) * BLOCK_N, whole_end)
        near_begin = tl.multiple_of(near_begin, BLOCK_N)
        near_end = tl.multiple_of(near_end, BLOCK_N)
    return begin, whole_begin, near_begin, near_end, whole_end, end
