"""Device code of attention, dense and varlen: online softmax over key blocks (FlashAttention-2, Dao 2023).

One program computes one tile of queries of one head. Key blocks that every query of the tile sees whole run
in a loop without bounds; the others, at the window's left edge, at the diagonal and the end, in loops of
their own; blocks that nothing sees, in none.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dropout import dropout_row_key
from .attention_blocks import attend_blocks
from .attention_ranges import block_edges, sequence_of, visible_offsets
from .attention_steps import add_sink, load_rows

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)

# Lengths change with every batch; specialized on (1, or divisible by 16), they would compile nine kernels.
VARYING = [
    "max_queries", "max_keys", "query_start", "window_left", "window_right", "reach", "threshold",
    "stride_lb", "stride_lh", "stride_dh",
]  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def attention_kernel(
    query, key, value, out, lse, mask, bias, distance_bias, alibi_slopes, sinks, key_lengths, query_starts,
    seed, cu_seqlens_q, cu_seqlens_k, query_heads, group_size, max_queries, max_keys, query_start,
    window_left, window_right, reach, score_scale, softcap, threshold, keep_scale,
    stride_qb, stride_qh, stride_qm, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    stride_mb, stride_mh, stride_mm, stride_mn, stride_bb, stride_bh, stride_bm, stride_bn,
    stride_lb, stride_lh, stride_dh, stride_ah, stride_sh, VARLEN: tl.constexpr, DEFAULT_START: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SCALE_LATE: tl.constexpr,
    DESCRIBED: tl.constexpr, MASK_PER_QUERY: tl.constexpr, BIAS_PER_QUERY: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Attention of one tile of BLOCK_M queries; the pointers of what is absent are None."""
    # Tiles of one head are neighbours and share its keys in the cache; where a row sees no keys beyond it,
    # the last tile is the longest and starts first.
    blocks = tl.cdiv(max_queries, BLOCK_M)
    block = tl.program_id(0) % blocks
    if HAS_RIGHT:
        block = blocks - 1 - block
    head = (tl.program_id(0) // blocks) % query_heads
    batch = tl.program_id(0) // (blocks * query_heads)
    first = block * BLOCK_M
    query_begin, query_count = sequence_of(cu_seqlens_q, batch, max_queries, VARLEN)
    key_begin, key_count = sequence_of(cu_seqlens_k, batch, max_keys, VARLEN)
    if first >= query_count:
        return
    start, left, right = visible_offsets(
        query_start, query_starts, key_count - query_count, batch, window_left, window_right, DEFAULT_START,
        HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    if key_lengths is not None:
        key_count = tl.minimum(tl.maximum(tl.load(key_lengths + batch), 0), max_keys).to(tl.int32)
    last = tl.minimum(first + BLOCK_M, query_count) - 1
    RELATIVE: tl.constexpr = distance_bias is not None
    near_left = None
    near_right = None
    if RELATIVE:
        near_left = first + start - reach + 1
        near_right = last + start + reach
    edges = block_edges(
        first, last, left, right, key_count, near_left, near_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )

    rows = tl.arange(0, BLOCK_M).to(INDEX)
    dims = tl.arange(0, BLOCK_D).to(INDEX)
    value_dims = tl.arange(0, BLOCK_DV).to(INDEX)
    rows_valid = first + tl.arange(0, BLOCK_M) < query_count
    wide_batch = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    key_head = head // group_size
    first_row = query_begin + first
    if DESCRIBED:
        query_at = (query, batch, head)
        key_at = (key, batch, key_head)
        value_at = (value, batch, key_head)
    else:
        query_base = query + wide_batch * stride_qb + wide_head * stride_qh + query_begin * stride_qm
        query_at = (query_base, stride_qm, stride_qd)
        key_base = key + wide_batch * stride_kb + key_head.to(tl.int64) * stride_kh + key_begin * stride_kn
        key_at = (key_base, stride_kn, stride_kd)
        value_base = (
            value + wide_batch * stride_vb + key_head.to(tl.int64) * stride_vh + key_begin * stride_vn
        )
        value_at = (value_base, stride_vn, stride_vd)
    mask_at = None
    if mask is not None:
        mask_base = mask + wide_batch * stride_mb + wide_head * stride_mh + first_row * stride_mm
        mask_at = (mask_base, stride_mm, stride_mn)
    bias_at = None
    if bias is not None:
        bias_base = bias + wide_batch * stride_bb + wide_head * stride_bh + first_row * stride_bm
        bias_at = (bias_base, stride_bm, stride_bn)
    distance_zero = None
    if distance_bias is not None:
        distance_zero = distance_bias + wide_head * stride_dh + stride_dh // 2
    slope = None
    if alibi_slopes is not None:
        slope = tl.load(alibi_slopes + head * stride_ah).to(tl.float32)
        if bias is None:
            slope *= LOG2E
    # The position in lse is the row that dropout counts, too.
    lse_row = wide_batch * stride_lb + wide_head * stride_lh + first_row + tl.arange(0, BLOCK_M)
    row_key = None
    if seed is not None:
        row_key = dropout_row_key(seed, lse_row)

    query_tile = load_rows(query_at, first, rows, rows_valid, dims, True, HEAD_DIM, DESCRIBED)
    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # The window's left edge; the keys that every query sees: too far to the left for the relative bias to
    # vary, near, too far to the right; the diagonal and the end.
    for PART in tl.static_range(5):
        far_bias = None
        if RELATIVE and (PART == 1 or PART == 3):
            far_bias = tl.load(distance_zero + (reach if PART == 3 else -reach))
        if PART == 2 or PART == 4 or (HAS_LEFT if PART == 0 else RELATIVE):
            accumulator, maximum, total = attend_blocks(
                accumulator, maximum, total, query_tile, key_at, value_at, mask_at, bias_at, distance_zero,
                reach, far_bias, slope, row_key, threshold, edges[PART], edges[PART + 1], key_count,
                first + start, first + left, first + right, rows_valid, score_scale, softcap,
                PART == 0 or PART == 4, HAS_LEFT, HAS_RIGHT, MASK_PER_QUERY, BIAS_PER_QUERY, HAS_SOFTCAP,
                SCALE_LATE, key_lengths is not None, DESCRIBED, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N,
                BLOCK_D, BLOCK_DV, INDEX,
            )  # fmt: skip

    empty = total == 0.0
    if sinks is not None:
        sink = tl.load(sinks + head * stride_sh).to(tl.float32)
        if bias is None:
            sink *= LOG2E
        accumulator, maximum, total = add_sink(accumulator, maximum, total, sink, bias is None)
    safe_total = tl.where(total == 0.0, 1.0, total)
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
        natural = tl.where(total == 0.0, float("-inf"), natural + tl.log(safe_total))
        tl.store(lse + lse_row, natural, mask=rows_valid)
