"""What happens to attention scores between the two matrix products: soft cap, biases and what may be seen."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_steps import load_tile

__all__ = ["add_position_terms", "hide_invisible", "load_per_score", "soft_cap"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def soft_cap(x, EXACT: tl.constexpr):
    """tanh(x) by exp2: to about 1e-7, or with EXACT to a few units in the last place of any result."""
    growth = tl.math.exp2(x * (2 * LOG2E))
    # Infinite and zero growth give the limits, 1 and -1.
    result = 1.0 - 2.0 / (growth + 1.0)
    if EXACT:
        # Near zero the difference cancels; there an odd polynomial of x, fitted to relative error 6e-9.
        square = x * x
        series = -5.591013251555e-3
        series = series * square + 2.053881706450e-2
        series = series * square - 5.370965647071e-2
        series = series * square + 1.333109223859e-1
        series = series * square - 3.333326951636e-1
        result = tl.where(tl.abs(x) < 0.625, x + x * square * series, result)
    return result


@triton.jit
def load_per_score(
    base, rows, keys, rows_valid, keys_valid, stride_m, stride_n, PER_QUERY: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
):  # fmt: skip
    """A mask's or bias's values for scores: [1, keys] if queries share them, else [queries, keys]."""
    if PER_QUERY:
        pointers = base + rows[:, None] * stride_m + keys[None, :] * stride_n
        return load_tile(pointers, rows_valid, keys_valid, True, CHECK_KEYS)
    elif CHECK_KEYS:
        return tl.load(base + keys * stride_n, mask=keys_valid, other=0)[None, :]
    else:
        return tl.load(base + keys * stride_n)[None, :]


@triton.jit
def add_position_terms(scores, offset, rows, keys, distance_bias, reach, far_bias, slope):
    """Add what depends on the distance of key and query alone: a relative bias and ALiBi's slope.

    `offset` is the position of the block's first key less that of the tile's first query, `distance_bias`
    where the head's bias at distance 0 lies, `far_bias` the one value of a block wholly beyond reach; what is
    absent is None.
    """
    if far_bias is not None:
        scores += far_bias
    elif distance_bias is not None:
        # Bounding the block instead of every distance leaves addresses that differ by constants. A block
        # beyond these bounds holds the value it has there.
        near_offset = tl.minimum(tl.maximum(offset, -reach - keys.shape[0]), reach + rows.shape[0])
        scores += tl.load(distance_bias + near_offset + (keys[None, :] - rows[:, None]))
    if slope is not None:
        distance = (offset + keys).to(tl.float32)[None, :] - rows.to(tl.float32)[:, None]
        scores -= tl.abs(distance) * slope
    return scores


@triton.jit
def hide_invisible(
    scores, start, rows, keys, keys_valid, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """-inf where a key is past the end, or outside of [row + left, row + right]."""
    visible = keys_valid[None, :]
    position = (start + keys)[None, :]
    if HAS_LEFT:
        visible = visible & (position >= (left + rows)[:, None])
    if HAS_RIGHT:
        visible = visible & (position <= (right + rows)[:, None])
    return tl.where(visible, scores, float("-inf"))
