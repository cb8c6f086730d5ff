"""The steps of an attention kernel: masked loads and the online softmax."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_sink", "load_rows", "load_tile", "softmax_step"]

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
def load_rows(
    at,
    start,
    rows,
    rows_valid,
    columns,
    CHECK_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Load rows start + `rows` of one head, [rows, columns], zero past the head size and where checked.

    `at` is (pointer, stride of rows, stride of columns), or with DESCRIBED (tensor descriptor, batch, head):
    the descriptor gives zero for what lies outside of the tensor, by itself.
    """
    if DESCRIBED:
        descriptor, batch, head = at
        tile = descriptor.load([batch, head, start.to(tl.int32), 0])
        return tl.reshape(tile, (rows.shape[0], columns.shape[0]))
    else:
        base, stride_row, stride_column = at
        base += start.to(tl.int64) * stride_row
        pointers = base + rows[:, None] * stride_row + columns[None, :] * stride_column
        return load_tile(pointers, rows_valid, columns < COLUMNS, CHECK_ROWS, columns.shape[0] != COLUMNS)


@triton.jit
def softmax_step(scores, maximum, total, IN_LOG2: tl.constexpr, MAY_BE_EMPTY: tl.constexpr, late_scale=None):
    """Fold scores into the running maximum and sum; gives their weights and the factor of earlier ones.

    late_scale: positive; given where `scores` are not scaled yet. The scale is then one multiply-add with the
    subtraction of the maximum instead of a product of its own.
    """
    block_maximum = tl.max(scores, 1)
    if late_scale is not None:
        block_maximum *= late_scale
        scores *= late_scale
    new_maximum = tl.maximum(maximum, block_maximum)
    # A row that has seen nothing has maximum -inf, and -inf - -inf would be NaN.
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum) if MAY_BE_EMPTY else new_maximum
    weights = power(scores - shift[:, None], IN_LOG2)
    rescale = power(maximum - shift, IN_LOG2)
    return weights, rescale, new_maximum, total * rescale + tl.sum(weights, 1)


@triton.jit
def power(x, IN_LOG2: tl.constexpr):
    """2 ** x, or e ** x where scores are not in base 2."""
    return tl.math.exp2(x) if IN_LOG2 else tl.math.exp2(x * LOG2E)


@triton.jit
def add_sink(accumulator, maximum, total, sink, IN_LOG2: tl.constexpr):
    """Fold one more logit into the softmax that weighs no value."""
    new_maximum = tl.maximum(maximum, sink)
    shift = tl.where(new_maximum == float("-inf"), 0.0, new_maximum)
    rescale = power(maximum - shift, IN_LOG2)
    return accumulator * rescale[:, None], new_maximum, total * rescale + power(sink - shift, IN_LOG2)
