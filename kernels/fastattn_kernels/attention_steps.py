"""The steps of an attention kernel's loop over key blocks: masked loads and the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_per_score", "load_tile", "softmax_step"]

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(pointers, rows_valid, columns_valid, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """Load a 2-D tile, zero where a checked row or column is not there."""
    if CHECK_ROWS and CHECK_COLUMNS:
        return tl.load(pointers, mask=rows_valid[:, None] & columns_valid[None, :], other=0)
    elif CHECK_ROWS:
        return tl.load(pointers, mask=rows_valid[:, None], other=0)
    elif CHECK_COLUMNS:
        return tl.load(pointers, mask=columns_valid[None, :], other=0)
    else:
        return tl.load(pointers)


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
def softmax_step(scores, maximum, total, IN_LOG2: tl.constexpr, MAY_BE_EMPTY: tl.constexpr):
    """Fold scores into the running maximum and sum; gives their weights and the factor of earlier ones."""
    new_maximum = tl.maximum(maximum, tl.max(scores, 1))
    # A row that has seen nothing has maximum -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MAY_BE_EMPTY else new_maximum
    if IN_LOG2:
        weights = tl.math.exp2(scores - shift[:, None])
        rescale = tl.math.exp2(maximum - shift)
    else:
        weights = tl.math.exp2((scores - shift[:, None]) * LOG2E)
        rescale = tl.math.exp2((maximum - shift) * LOG2E)
    return weights, rescale, new_maximum, total * rescale + tl.sum(weights, 1)
