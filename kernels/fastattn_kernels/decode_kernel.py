"""Device code of decoding: few queries over a long cache, its keys split among programs (flash-decoding).

Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference" (2023). One program attends one
split of a sequence's keys, with all new queries of the heads that share them as the rows of its tile. It
writes the result where there is one split, and else a part for decode_reduction.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_scores import soft_cap
from .attention_steps import load_tile, softmax_step
from .decode_steps import (
    add_relative_bias,
    add_sink,
    dequantize,
    locate_keys,
    row_offsets,
    split_keys,
)

__all__ = ["decode_kernel"]

# What differs from call to call; specialized on (1, or divisible by 16), it would compile many kernels.
VARYING = ["max_keys", "queries", "num_splits", "window_left", "stride_ls", "stride_os", "stride_t"]


@triton.jit(do_not_specialize=VARYING)
def decode_kernel(
    query, key_cache, value_cache, out, lse, cache_lengths, block_table, key_scale, value_scale, rel_table,
    alibi_slopes, sinks, scale, softcap, window_left, key_heads, group_size, queries, max_keys, num_splits,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_os, stride_ob, stride_oh, stride_om, stride_ls,
    stride_t, stride_rb, stride_rh, SPLIT: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGE_SIZE: tl.constexpr, FP8: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    REL_EXACT: tl.constexpr, REL_THRESHOLDS: tl.constexpr,
):  # fmt: skip
    """One split of one sequence for BLOCK_M rows, query-major, of one key head's group."""
    row_count = queries * group_size
    row_blocks = tl.cdiv(row_count, BLOCK_M)
    program = tl.program_id(0)
    row_block = program % row_blocks
    key_head = (program // row_blocks % key_heads).to(tl.int64)
    split = program // (row_blocks * key_heads) % num_splits
    batch = (program // (row_blocks * key_heads) // num_splits).to(tl.int64)

    length = tl.minimum(tl.maximum(tl.load(cache_lengths + batch), 0), max_keys).to(tl.int32)
    first_key, begin, chunk = split_keys(length, queries, window_left, num_splits, WINDOW, BLOCK_N)
    begin += split * chunk
    end = tl.minimum(begin + chunk, length)
    if SPLIT and begin >= end:
        return

    row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_valid = row < row_count
    head = key_head * group_size + row % group_size
    query_index = (row // group_size).to(tl.int64)
    position = length - queries + row // group_size
    dims = tl.arange(0, BLOCK_D).to(tl.int64)
    value_dims = tl.arange(0, BLOCK_DV).to(tl.int64)

    query_rows = query + batch * stride_qb + head * stride_qh + query_index * stride_qm
    query_tile = load_tile(
        query_rows[:, None] + dims[None, :] * stride_qd, rows_valid, dims < HEAD_DIM, True,
        HEAD_DIM != BLOCK_D,
    )  # fmt: skip
    key_base = key_cache + key_head * stride_kh
    value_base = value_cache + key_head * stride_vh
    pages = block_table
    if PAGE_SIZE == 0:
        key_base += batch * stride_kb
        value_base += batch * stride_vb
    else:
        pages = block_table + batch * stride_t
    if key_scale is not None:
        scale *= tl.load(key_scale + key_head)
    # Rows past the last must not read beyond the heads' own tables.
    safe_head = tl.where(rows_valid, head, 0)
    if rel_table is not None:
        table_columns = (safe_head * stride_rh).to(tl.int32)
    if alibi_slopes is not None:
        slopes = tl.load(alibi_slopes + safe_head).to(tl.float32)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        # Nothing before the window is read, either: its pages may have been given to another sequence.
        keys_valid = (keys >= first_key) & (keys < end)
        page, page_row = locate_keys(start, keys_valid, pages, PAGE_SIZE, BLOCK_N)

        key_rows = key_base + row_offsets(page, page_row, stride_kb, stride_kn, PAGE_SIZE)
        key = load_tile(
            key_rows[:, None] + dims[None, :] * stride_kd, keys_valid, dims < HEAD_DIM, True,
            HEAD_DIM != BLOCK_D,
        )  # fmt: skip
        key = dequantize(key, FP8, query_tile.dtype)
        scores = tl.dot(query_tile, tl.trans(key), input_precision="ieee") * scale
        if SOFTCAP:
            scores = soft_cap(scores / softcap, query_tile.dtype == tl.float32) * softcap
        steps = position[:, None] - keys[None, :]
        if rel_table is not None:
            nearest = length - queries - (start + BLOCK_N - 1)
            scores = add_relative_bias(
                scores, steps, nearest, rel_table, table_columns, stride_rb, REL_EXACT, REL_THRESHOLDS
            )
        if alibi_slopes is not None:
            scores -= slopes[:, None] * steps.to(tl.float32)
        visible = keys_valid[None, :] & (steps >= 0)
        if WINDOW:
            visible = visible & (steps <= window_left)
        scores = tl.where(visible, scores, float("-inf"))

        weights, rescale, maximum, total = softmax_step(scores, maximum, total, False, True)
        value_rows = value_base + row_offsets(page, page_row, stride_vb, stride_vn, PAGE_SIZE)
        value = load_tile(
            value_rows[:, None] + value_dims[None, :] * stride_vd, keys_valid, value_dims < VALUE_DIM, True,
            VALUE_DIM != BLOCK_DV,
        )  # fmt: skip
        value = dequantize(value, FP8, query_tile.dtype)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")

    empty = total == 0.0
    if sinks is not None and not SPLIT:
        sink = tl.load(sinks + safe_head).to(tl.float32)
        rescale, maximum, total = add_sink(maximum, total, sink)
        accumulator = accumulator * rescale[:, None]
    safe_total = tl.where(total == 0.0, 1.0, total)
    result = accumulator / safe_total[:, None]
    if value_scale is not None:
        result *= tl.load(value_scale + key_head)
    # Not a product with zero: the values behind an empty row may be NaN.
    result = tl.where(empty[:, None], 0.0, result).to(out.dtype.element_ty)
    out_rows = out + split.to(tl.int64) * stride_os + batch * stride_ob + head * stride_oh
    out_pointers = (out_rows + query_index * stride_om)[:, None] + value_dims[None, :]
    tl.store(out_pointers, result, mask=rows_valid[:, None] & (value_dims < VALUE_DIM)[None, :])
    if lse is not None:
        lse_row = (batch * key_heads * group_size + head) * queries + query_index
        tl.store(
            lse + split.to(tl.int64) * stride_ls + lse_row, maximum + tl.log(safe_total), mask=rows_valid
        )
