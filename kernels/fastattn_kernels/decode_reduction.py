"""Device code that joins the parts decode_kernel.py leaves where a sequence's keys were split."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_steps import load_tile, softmax_step
from .decode_steps import add_sink, split_keys

__all__ = ["decode_reduction_kernel"]

VARYING = ["rows", "queries", "max_keys", "num_splits", "window_left"]


@triton.jit(do_not_specialize=VARYING)
def decode_reduction_kernel(
    parts, part_lse, out, lse, cache_lengths, sinks, window_left, heads, queries, rows, max_keys, num_splits,
    stride_ob, stride_oh, stride_om, WINDOW: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """The row of one query of one head, from the parts of the splits that had keys.

    `parts` is float32 [num_splits, rows, VALUE_DIM] and `part_lse` [num_splits, rows], the rows being
    [batch, head, query]. Splits are taken in their order, so that the result repeats to the bit.
    """
    row = tl.program_id(0).to(tl.int64)
    query_index = row % queries
    head = row // queries % heads
    batch = row // queries // heads
    length = tl.minimum(tl.maximum(tl.load(cache_lengths + batch), 0), max_keys).to(tl.int32)
    _, begin, chunk = split_keys(length, queries, window_left, num_splits, WINDOW, BLOCK_N)
    used = tl.cdiv(tl.maximum(length - begin, 0), tl.maximum(chunk, 1))

    value_dims = tl.arange(0, BLOCK_DV)
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    accumulator = tl.zeros([BLOCK_DV], tl.float32)
    for start in range(0, used, BLOCK_S):
        splits = start + tl.arange(0, BLOCK_S)
        part_rows = splits.to(tl.int64) * rows + row
        normalizers = tl.load(part_lse + part_rows, mask=splits < used, other=float("-inf"))
        weights, rescale, maximum, total = softmax_step(normalizers[None, :], maximum, total, False, True)
        part = load_tile(
            parts + part_rows[:, None] * VALUE_DIM + value_dims[None, :], splits < used,
            value_dims < VALUE_DIM, True, VALUE_DIM != BLOCK_DV,
        )  # fmt: skip
        accumulator = accumulator * rescale + tl.sum(tl.trans(weights) * part, 0)

    empty = total == 0.0
    if sinks is not None:
        rescale, maximum, total = add_sink(maximum, total, tl.load(sinks + head).to(tl.float32))
        accumulator = accumulator * rescale
    safe_total = tl.where(total == 0.0, 1.0, total)
    # Not a product with zero: a part that saw nothing is zeros, but one that saw something may be infinite.
    result = tl.where(empty, 0.0, accumulator / safe_total).to(out.dtype.element_ty)
    out_row = out + batch * stride_ob + head * stride_oh + query_index * stride_om
    tl.store(out_row + value_dims, result, mask=value_dims < VALUE_DIM)
    if lse is not None:
        tl.store(lse + row + tl.arange(0, 1), maximum + tl.log(safe_total))
