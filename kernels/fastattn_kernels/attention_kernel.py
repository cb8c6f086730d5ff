"""Device code of attention, dense and varlen: online softmax over key blocks (FlashAttention-2, Dao 2023).

One program computes one tile of queries of one head. Key blocks that every query of the tile sees whole run
in a loop without bounds or causality; the others, at the diagonal and the end, in a second; blocks that
nothing sees, in none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dropout import dropout_keep, dropout_row_key
from .attention_steps import load_per_score, load_tile, softmax_step

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_blocks(
    accumulator, maximum, total, query, key_base, value_base, mask_base, bias_base, row_key, threshold,
    begin, end, key_count, diagonal, rows, rows_valid, score_scale,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn, stride_bm, stride_bn,
    BOUNDARY: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, MASK_PER_QUERY: tl.constexpr,
    HAS_BIAS: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Attend the key blocks in [begin, end), a multiple of BLOCK_N long unless BOUNDARY."""
    keys = tl.arange(0, BLOCK_N).to(INDEX)
    dims = tl.arange(0, BLOCK_D).to(INDEX)
    value_dims = tl.arange(0, BLOCK_DV).to(INDEX)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        wide_start = start.to(tl.int64)
        keys_valid = start + tl.arange(0, BLOCK_N) < key_count

        key_pointers = (
            key_base + wide_start * stride_kn + keys[:, None] * stride_kn + dims[None, :] * stride_kd
        )
        key = load_tile(key_pointers, keys_valid, dims < HEAD_DIM, BOUNDARY, HEAD_DIM != BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * score_scale
        if HAS_BIAS:
            base = bias_base + wide_start * stride_bn
            bias = load_per_score(
                base, rows, keys, rows_valid, keys_valid, stride_bm, stride_bn, BIAS_PER_QUERY, BOUNDARY
            )
            scores += bias.to(tl.float32)
        if HAS_MASK:
            base = mask_base + wide_start * stride_mn
            mask = load_per_score(
                base, rows, keys, rows_valid, keys_valid, stride_mm, stride_mn, MASK_PER_QUERY, BOUNDARY
            )
            scores = tl.where(mask != 0, scores, float("-inf"))
        if BOUNDARY:
            visible = keys_valid[None, :]
            if CAUSAL:
                visible = visible & (start + keys[None, :] <= diagonal + rows[:, None])
            scores = tl.where(visible, scores, float("-inf"))

        weights, rescale, maximum, total = softmax_step(
            scores, maximum, total, not HAS_BIAS, BOUNDARY or HAS_MASK or HAS_BIAS
        )
        if DROPOUT:
            keep = dropout_keep(row_key[:, None], (start + tl.arange(0, BLOCK_N))[None, :], threshold)
            weights = tl.where(keep, weights, 0.0)
        value_pointers = (
            value_base + wide_start * stride_vn + keys[:, None] * stride_vn + value_dims[None, :] * stride_vd
        )
        value = load_tile(value_pointers, keys_valid, value_dims < VALUE_DIM, BOUNDARY, VALUE_DIM != BLOCK_DV)
        accumulator = accumulator * rescale[:, None]
        accumulator = tl.dot(weights.to(value.dtype), value, accumulator, input_precision="ieee")
    return accumulator, maximum, total


# Lengths change with every batch; specialized on (1, or divisible by 16), they would compile nine kernels.
VARYING = ["max_queries", "max_keys", "query_start", "threshold", "stride_lb", "stride_lh"]


@triton.jit(do_not_specialize=VARYING)
def attention_kernel(
    query, key, value, out, lse, mask, bias, key_lengths, query_starts, seed, cu_seqlens_q, cu_seqlens_k,
    query_heads, group_size, max_queries, max_keys, query_start, score_scale, threshold, keep_scale,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_lb, stride_lh, VARLEN: tl.constexpr, CAUSAL: tl.constexpr, DEFAULT_START: tl.constexpr,
    MASK_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of BLOCK_M queries; the pointers of what is absent are None."""
    # Tiles of one head are neighbours and share its keys in the cache; causal starts with the last, which is
    # the longest.
    blocks = tl.cdiv(max_queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    if CAUSAL:
        block = blocks - 1 - block
    head = (tl.program_id(0) // blocks) % query_heads
    batch = tl.program_id(0) // (blocks * query_heads)
    first = block * BLOCK_M

    query_begin = tl.zeros([], tl.int64)
    key_begin = tl.zeros([], tl.int64)
    query_count = max_queries
    key_count = max_keys
    if VARLEN:
        query_begin = tl.load(cu_seqlens_q + batch).to(tl.int64)
        key_begin = tl.load(cu_seqlens_k + batch).to(tl.int64)
        query_count = (tl.load(cu_seqlens_q + batch + 1) - query_begin).to(tl.int32)
        key_count = (tl.load(cu_seqlens_k + batch + 1) - key_begin).to(tl.int32)
    if first >= query_count:
        return
    # Which keys: [0, key_count) are there, [0, whole_end) seen by every query of the tile, [0, end) by any.
    if key_lengths is not None:
        key_count = tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), max_keys).to(tl.int32)
    whole_end = key_count
    end = key_count
    diagonal = first
    if CAUSAL:
        if DEFAULT_START:
            start = key_count - query_count
        elif query_starts is not None:
            start = tl.load(query_starts + batch)
        else:
            start = query_start
        # Beyond these bounds nothing changes, and the sum below stays within 32 bits.
        start = tl.minimum(tl.maximum(start, -query_count), key_count).to(tl.int32)
        diagonal = first + start
        whole_end = tl.minimum(key_count, tl.maximum(diagonal + 1, 0))
        end = tl.minimum(key_count, tl.maximum(tl.minimum(first + BLOCK_M, query_count) + start, 0))
    whole_end = whole_end // BLOCK_N * BLOCK_N

    rows = tl.arange(0, BLOCK_M).to(INDEX)
    dims = tl.arange(0, BLOCK_D).to(INDEX)
    value_dims = tl.arange(0, BLOCK_DV).to(INDEX)
    rows_valid = first + tl.arange(0, BLOCK_M) < query_count
    wide_batch = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    key_head = (head // group_size).to(tl.int64)
    first_row = query_begin + first
    query_base = query + wide_batch * stride_qb + wide_head * stride_qh + first_row * stride_qm
    key_base = key + wide_batch * stride_kb + key_head * stride_kh + key_begin * stride_kn
    value_base = value + wide_batch * stride_vb + key_head * stride_vh + key_begin * stride_vn
    mask_base = mask
    if mask is not None:
        mask_base = mask + wide_batch * stride_mb + wide_head * stride_mh + first_row * stride_mm
    bias_base = bias
    if bias is not None:
        bias_base = bias + wide_batch * stride_bb + wide_head * stride_bh + first_row * stride_bm
    # The position in lse is the row that dropout counts, too.
    lse_row = wide_batch * stride_lb + wide_head * stride_lh + first_row + tl.arange(0, BLOCK_M)
    row_key = None
    if seed is not None:
        row_key = dropout_row_key(seed, lse_row)

    query_pointers = query_base + rows[:, None] * stride_qm + dims[None, :] * stride_qd
    query_tile = load_tile(query_pointers, rows_valid, dims < HEAD_DIM, True, HEAD_DIM != BLOCK_D)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for BOUNDARY in tl.static_range(2):
        accumulator, maximum, total = attend_blocks(
            accumulator, maximum, total, query_tile, key_base, value_base, mask_base, bias_base, row_key,
            threshold, whole_end if BOUNDARY else 0, end if BOUNDARY else whole_end, key_count, diagonal,
            rows, rows_valid, score_scale, stride_kn, stride_kd, stride_vn, stride_vd, stride_mm, stride_mn,
            stride_bm, stride_bn, BOUNDARY, CAUSAL, mask is not None, MASK_PER_QUERY, bias is not None,
            BIAS_PER_QUERY, seed is not None, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, INDEX,
        )  # fmt: skip

    empty = total == 0.0
    safe_total = tl.where(empty, 1.0, total)
    result = accumulator / safe_total[:, None]
    if seed is not None:
        result *= keep_scale
    # Not a product with zero: the values behind an empty row may be NaN.
    result = tl.where(empty[:, None], 0.0, result).to(out.dtype.element_ty)
    out_base = out + wide_batch * stride_ob + wide_head * stride_oh + first_row * stride_om
    out_pointers = out_base + rows[:, None] * stride_om + value_dims[None, :] * stride_od
    tl.store(out_pointers, result, mask=rows_valid[:, None] & (value_dims < VALUE_DIM)[None, :])
    if lse is not None:
        natural = maximum if bias is not None else maximum * LN2
        tl.store(lse + lse_row, tl.where(empty, float("-inf"), natural + tl.log(safe_total)), mask=rows_valid)
