"""Residual add, dropout and layer normalization in one pass over memory: device code and launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._dropout import dropout_constants, dropout_keep, dropout_row_key
from ._launch import Launch
from .norm_config import choose_norm_config

__all__ = ["add_layer_norm_forward", "plan_add_layer_norm"]


@triton.jit
def add_rows(x, residual, offsets_x, offsets_residual, columns, valid, row_key, threshold, keep_scale):
    """residual + dropout(x), in float32, rounded to x's dtype as an unfused add is."""
    tile = tl.load(x + offsets_x + columns, mask=valid, other=0.0)
    added = tile.to(tl.float32)
    if row_key is not None:
        # Rounded between dropout and add, too: unfused, these are two operations.
        added = tl.where(dropout_keep(row_key, columns, threshold), added * keep_scale, 0.0)
        added = added.to(tile.dtype).to(tl.float32)
    added += tl.load(residual + offsets_residual + columns, mask=valid, other=0.0).to(tl.float32)
    return added.to(tile.dtype)


@triton.jit
def scale_and_shift(normalized, weight, bias, columns, columns_valid):
    """normalized * weight + bias, each where given."""
    if weight is not None:
        normalized *= tl.load(weight + columns, mask=columns_valid, other=0.0).to(tl.float32)
    if bias is not None:
        normalized += tl.load(bias + columns, mask=columns_valid, other=0.0).to(tl.float32)
    return normalized


@triton.jit(do_not_specialize=["row_count", "threshold"])
def add_layer_norm_kernel(
    x, residual, weight, bias, normalized, total, seed, row_count, eps, threshold, keep_scale, stride_x,
    stride_residual, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers: the mean, then squares of what is left (two passes, so nothing cancels)."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = (rows < row_count) & (columns < WIDTH)
    row_key = None
    if seed is not None:
        row_key = dropout_row_key(seed, rows)
    added = add_rows(
        x, residual, rows * stride_x, rows * stride_residual, columns, valid, row_key, threshold, keep_scale
    )
    tl.store(total + rows * WIDTH + columns, added, mask=valid)
    values = added.to(tl.float32)
    mean = tl.sum(values, 1, keep_dims=True) / WIDTH
    centered = tl.where(valid, values - mean, 0.0)
    variance = tl.sum(centered * centered, 1, keep_dims=True) / WIDTH
    result = scale_and_shift(centered * tl.rsqrt(variance + eps), weight, bias, columns, columns < WIDTH)
    tl.store(normalized + rows * WIDTH + columns, result.to(added.dtype), mask=valid)


@triton.jit(do_not_specialize=["row_count", "threshold"])
def add_layer_norm_wide_kernel(
    x, residual, weight, bias, normalized, total, seed, row_count, eps, threshold, keep_scale, stride_x,
    stride_residual, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A row too wide for registers, one a program: statistics by blocks, then the norm of the written sum."""
    row = tl.program_id(0).to(tl.int64)
    row_key = None
    if seed is not None:
        row_key = dropout_row_key(seed, row)
    mean = 0.0
    squares = 0.0
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < WIDTH
        added = add_rows(
            x, residual, row * stride_x, row * stride_residual, columns, valid, row_key, threshold, keep_scale
        )
        tl.store(total + row * WIDTH + columns, added, mask=valid)
        values = added.to(tl.float32)
        # Blocks' means and squares combine without cancelling (Chan, Golub and LeVeque, 1979).
        count = tl.minimum(WIDTH - start, BLOCK_N).to(tl.float32)
        block_mean = tl.sum(values, 0) / count
        centered = tl.where(valid, values - block_mean, 0.0)
        difference = block_mean - mean
        seen = start + count
        mean += difference * (count / seen)
        squares += tl.sum(centered * centered, 0) + difference * difference * (start * count / seen)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    # The loop below may read with other threads than wrote.
    tl.debug_barrier()
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < WIDTH
        added = tl.load(total + row * WIDTH + columns, mask=valid, other=0.0)
        result = scale_and_shift((added.to(tl.float32) - mean) * rstd, weight, bias, columns, valid)
        tl.store(normalized + row * WIDTH + columns, result.to(added.dtype), mask=valid)


def add_layer_norm_forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Layer normalization of residual + dropout(x) over the last dimension, statistics in float32.

    Args:
        x: [..., N], float16, bfloat16 or float32, any strides (rows not contiguous in themselves are copied).
        residual: x's shape.
        weight: [N] or None.
        bias: [N] or None.
        eps: added to the variance.
        dropout_p: probability that an element of x is dropped; needs `seed`.
        seed: int64 [1].

    Returns:
        (normalized, sum), both contiguous, of x's shape and dtype; the norm of the rounded sum, as unfused.
    """
    normalized = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(normalized)
    if x.numel():
        plan_add_layer_norm(x, residual, weight, bias, normalized, total, eps, dropout_p, seed).run(x.device)
    return normalized, total


def plan_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    normalized: torch.Tensor,
    total: torch.Tensor,
    eps: float,
    dropout_p: float,
    seed: torch.Tensor | None,
) -> Launch:
    """The launch of `add_layer_norm_forward`, writing into `normalized` and `total`."""
    x, residual = as_rows(x), as_rows(residual)
    rows, width = x.shape
    config = choose_norm_config(rows, width, x.element_size())
    threshold, keep_scale = dropout_constants(dropout_p)
    arguments = dict(
        x=x,
        residual=residual,
        weight=None if weight is None else weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        normalized=normalized,
        total=total,
        seed=seed if dropout_p > 0.0 else None,
        row_count=rows,
        eps=eps,
        threshold=threshold,
        keep_scale=keep_scale,
        stride_x=x.stride(0),
        stride_residual=residual.stride(0),
        WIDTH=width,
        BLOCK_ROWS=config.block_rows,
        BLOCK_N=config.block_n,
    )
    kernel = add_layer_norm_wide_kernel if config.loop else add_layer_norm_kernel
    return Launch(kernel, triton.cdiv(rows, config.block_rows), arguments, config.num_warps, num_stages=1)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` as [rows, N] with a contiguous last dimension: a view where its strides allow, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
