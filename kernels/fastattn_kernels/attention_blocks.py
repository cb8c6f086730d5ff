"""The loop of attention over key blocks: scores, online softmax, weighted values."""

from __future__ import annotations

import triton
import triton.language as tl

from ._dropout import dropout_keep
from .attention_scores import add_position_terms, hide_invisible, load_per_score, soft_cap
from .attention_steps import load_rows, softmax_step

__all__ = ["attend_blocks"]


@triton.jit
def attend_blocks(
    accumulator, maximum, total, query, key_at, value_at, mask_at, bias_at, distance_bias, reach, far_bias,
    slope, row_key, threshold, begin, end, key_count, position, left, right, rows_valid, score_scale, softcap,
    BOUNDARY: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
    BIAS_PER_QUERY: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SCALE_LATE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, DESCRIBED: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Attend the key blocks in [begin, end), a multiple of BLOCK_N long unless BOUNDARY.

    `key_at` and `value_at` are as `load_rows` takes them, `mask_at` and `bias_at` (pointer, stride of
    queries, stride of keys); what is absent is None. `position` is the first query's among the keys; row r
    sees keys [r + left, r + right]. `distance_bias`, `reach`, `far_bias` and `slope` are
    `add_position_terms`'s.
    """
    row_numbers = tl.arange(0, BLOCK_M)
    key_numbers = tl.arange(0, BLOCK_N)
    rows = row_numbers.to(INDEX)
    keys = key_numbers.to(INDEX)
    dims = tl.arange(0, BLOCK_D).to(INDEX)
    value_dims = tl.arange(0, BLOCK_DV).to(INDEX)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        wide_start = start.to(tl.int64)
        keys_valid = start + key_numbers < key_count

        key = load_rows(key_at, start, keys, keys_valid, dims, BOUNDARY, HEAD_DIM, DESCRIBED)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if not SCALE_LATE:
            scores *= score_scale
        if HAS_SOFTCAP:
            scores = soft_cap(scores, query.dtype == tl.float32) * softcap
        if bias_at is not None:
            bias_base, stride_bm, stride_bn = bias_at
            base = bias_base + wide_start * stride_bn
            bias = load_per_score(
                base, rows, keys, rows_valid, keys_valid, stride_bm, stride_bn, BIAS_PER_QUERY, BOUNDARY
            )
            scores += bias.to(tl.float32)
        scores = add_position_terms(
            scores, start - position, row_numbers, key_numbers, distance_bias, reach, far_bias, slope
        )
        if mask_at is not None:
            mask_base, stride_mm, stride_mn = mask_at
            base = mask_base + wide_start * stride_mn
            mask = load_per_score(
                base, rows, keys, rows_valid, keys_valid, stride_mm, stride_mn, MASK_PER_QUERY, BOUNDARY
            )
            scores = tl.where(mask != 0, scores, float("-inf"))
        if BOUNDARY:
            scores = hide_invisible(
                scores, start, row_numbers, key_numbers, keys_valid, left, right, HAS_LEFT, HAS_RIGHT
            )

        weights, rescale, maximum, total = softmax_step(
            scores, maximum, total, bias_at is None,
            BOUNDARY or mask_at is not None or bias_at is not None or distance_bias is not None,
            score_scale if SCALE_LATE else None,
        )  # fmt: skip
        if row_key is not None:
            keep = dropout_keep(row_key[:, None], (start + key_numbers)[None, :], threshold)
            weights = tl.where(keep, weights, 0.0)
        value = load_rows(value_at, start, keys, keys_valid, value_dims, BOUNDARY, VALUE_DIM, DESCRIBED)
        if DESCRIBED and BOUNDARY and HAS_LENGTHS:
            # What the tensor holds past a length may be NaN, which a weight of zero does not hide.
            value = tl.where(keys_valid[:, None], value, 0.0)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, maximum, total
