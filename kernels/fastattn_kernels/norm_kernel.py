"""Device code of the norms: residual addition with dropout, layer or RMS normalization, quantization.

Two kernels take every form by compile-time flags: rows that fit in registers, several a program, and wide
rows, one a program, block by block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._dropout import dropout_keep, dropout_row_key
from ._quantize import largest_magnitude, quantized, scale_of_magnitude
from ._rows import row_offsets

__all__ = ["norm_rows_kernel", "norm_wide_kernel"]


@triton.jit
def load_sum(x, residual, offsets_x, offsets_residual, columns, valid, row_key, threshold, keep_scale):
    """x, or residual + dropout(x) where there is a residual, rounded to x's dtype as an unfused add is."""
    tile = tl.load(x + offsets_x + columns, mask=valid, other=0.0)
    if residual is not None:
        added = tile.to(tl.float32)
        if row_key is not None:
            # Rounded between dropout and add, too: unfused, these are two operations.
            added = tl.where(dropout_keep(row_key, columns, threshold), added * keep_scale, 0.0)
            added = added.to(tile.dtype).to(tl.float32)
        added += tl.load(residual + offsets_residual + columns, mask=valid, other=0.0).to(tl.float32)
        return added.to(tile.dtype)
    else:
        return tile


@triton.jit
def scale_and_shift(normalized, weight, bias, offset, columns, valid):
    """normalized * (weight + offset) + bias, each where given."""
    if weight is not None:
        normalized *= tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32) + offset
    if bias is not None:
        normalized += tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32)
    return normalized


@triton.jit(do_not_specialize=["row_count", "threshold"])
def norm_rows_kernel(
    x, residual, weight, bias, out, total, scales, seed, row_count, eps, offset, threshold, keep_scale,
    inner, stride_x_outer, stride_x, stride_residual_outer, stride_residual,
    WIDTH: tl.constexpr, RMS: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: the mean, then squares of what is left (two passes, so nothing cancels)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = (rows < row_count) & (columns < WIDTH)
    row_key = None
    offsets_residual = None
    if residual is not None:
        offsets_residual = row_offsets(rows, row_count, inner, stride_residual_outer, stride_residual)
        if seed is not None:
            row_key = dropout_row_key(seed, rows)
    offsets_x = row_offsets(rows, row_count, inner, stride_x_outer, stride_x)
    tile = load_sum(x, residual, offsets_x, offsets_residual, columns, valid, row_key, threshold, keep_scale)
    if residual is not None:
        tl.store(total + rows * WIDTH + columns, tile, mask=valid)
    values = tile.to(tl.float32)
    if not RMS:
        # Divided exactly: a row of one number must come out as zeros, however small eps is.
        mean = tl.div_rn(tl.sum(values, 1, keep_dims=True), WIDTH * 1.0)
        values = tl.where(valid, values - mean, 0.0)
    variance = tl.sum(values * values, 1, keep_dims=True) / WIDTH
    result = scale_and_shift(
        values * tl.rsqrt(variance + eps), weight, bias, offset, columns, columns < WIDTH
    )
    if QUANTIZE is None:
        tl.store(out + rows * WIDTH + columns, result.to(tile.dtype), mask=valid)
    else:
        scale = scale_of_magnitude(largest_magnitude(result, 1), QUANTIZE)[:, None]
        tl.store(out + rows * WIDTH + columns, quantized(result, scale, QUANTIZE), mask=valid)
        tl.store(scales + rows, scale, mask=rows < row_count)


@triton.jit(do_not_specialize=["row_count", "threshold"])
def norm_wide_kernel(
    x, residual, weight, bias, out, total, scales, seed, row_count, eps, offset, threshold, keep_scale,
    inner, stride_x_outer, stride_x, stride_residual_outer, stride_residual,
    WIDTH: tl.constexpr, RMS: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row too wide for registers, one a program: statistics by blocks, then the norm of the row again."""
    row = tl.program_id(0).to(tl.int64)
    row_key = None
    offset_residual = None
    offset_x = row_offsets(row, row_count, inner, stride_x_outer, stride_x)
    # What later passes read.
    source = x + offset_x
    if residual is not None:
        source = total + row * WIDTH
        offset_residual = row_offsets(row, row_count, inner, stride_residual_outer, stride_residual)
        if seed is not None:
            row_key = dropout_row_key(seed, row)
    mean = 0.0
    squares = 0.0
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < WIDTH
        tile = load_sum(
            x, residual, offset_x, offset_residual, columns, valid, row_key, threshold, keep_scale
        )
        if residual is not None:
            tl.store(source + columns, tile, mask=valid)
        values = tile.to(tl.float32)
        if RMS:
            squares += tl.sum(values * values, 0)
        else:
            # Blocks' means and squares combine without cancelling (Chan, Golub and LeVeque, 1979).
            count = tl.minimum(WIDTH - start, BLOCK_N).to(tl.float32)
            block_mean = tl.div_rn(tl.sum(values, 0), count)
            centered = tl.where(valid, values - block_mean, 0.0)
            difference = block_mean - mean
            seen = start + count
            mean += difference * (count / seen)
            squares += tl.sum(centered * centered, 0) + difference * difference * (start * count / seen)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    if residual is not None:
        # The loops below may read with other threads than wrote.
        tl.debug_barrier()
    scale = 1.0
    if QUANTIZE is not None:
        magnitude = 0
        for start in range(0, WIDTH, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < WIDTH
            values = tl.load(source + columns, mask=valid, other=0.0).to(tl.float32)
            result = scale_and_shift((values - mean) * rstd, weight, bias, offset, columns, valid)
            magnitude = tl.maximum(magnitude, largest_magnitude(tl.where(valid, result, 0.0), 0))
        scale = scale_of_magnitude(magnitude, QUANTIZE)
        tl.store(scales + row, scale)
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < WIDTH
        tile = tl.load(source + columns, mask=valid, other=0.0)
        result = scale_and_shift((tile.to(tl.float32) - mean) * rstd, weight, bias, offset, columns, valid)
        if QUANTIZE is None:
            tl.store(out + row * WIDTH + columns, result.to(tile.dtype), mask=valid)
        else:
            tl.store(out + row * WIDTH + columns, quantized(result, scale, QUANTIZE), mask=valid)
