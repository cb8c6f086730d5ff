"""Masked, scaled, causal softmax over rows of any length: device code and launch. Arguments come validated.

The length is no compile-time constant (but whether 16 divides it): keys grow by one a step. Two kernels:
whole rows in registers, several a program, and long rows, one a program, block by block.
"""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl

from ._launch import Launch, architecture_of
from ._tuned import gpu_of
from .norm_config import MAX_BLOCK_ROWS, choose_norm_config

__all__ = ["plan_softmax", "softmax_forward"]

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def row_of_matrix(rows, row_count, queries, heads):
    """(batch, head, query) of each of the int64 `rows`."""
    # Division of 64 bits is slow; row_count has 32 wherever they do.
    narrow = rows.to(row_count.dtype)
    matrix = narrow // queries
    return (matrix // heads).to(tl.int64), (matrix % heads).to(tl.int64), (narrow % queries).to(tl.int64)


@triton.jit
def load_scores(x, mask, columns, valid, last, scale, stride_mask):
    """scale * x in float32, -inf where a row has no such column or may not see it."""
    read = valid
    if last is not None:
        # The future is not read, but in whole groups of 16: a mask of single elements would break up loads.
        read &= columns // 16 * 16 <= last
        valid &= columns <= last
    tile = tl.load(x + columns, mask=read, other=0.0)
    if mask is not None:
        valid &= tl.load(mask + columns * stride_mask, mask=read, other=0) != 0
    return tl.where(valid, tile.to(tl.float32) * scale, float("-inf"))


@triton.jit
def finite_maximum(maximum):
    """What to subtract: the maximum, or 0 of a row that sees nothing, whose -inf less -inf would be NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(do_not_specialize=["row_count", "queries", "heads"])
def softmax_rows_kernel(
    x, mask, out, row_count, queries, heads, width, scale, stride_xb, stride_xh, stride_xq, stride_mb,
    stride_mh, stride_mq, stride_mk, CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whole rows in registers."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    valid = (rows < row_count) & (columns < width)
    batch, head, query = row_of_matrix(rows, row_count, queries, heads)
    last = None
    if CAUSAL:
        last = query + (width - queries)
    if mask is not None:
        mask += batch * stride_mb + head * stride_mh + query * stride_mq
    x_rows = x + batch * stride_xb + head * stride_xh + query * stride_xq
    scores = load_scores(x_rows, mask, columns, valid, last, scale, stride_mk)
    maximum = finite_maximum(tl.max(scores, 1, keep_dims=True))
    weights = tl.exp2((scores - maximum) * LOG2_E)
    total = tl.sum(weights, 1, keep_dims=True)
    weights *= 1.0 / tl.where(total == 0.0, 1.0, total)
    tl.store(out + rows * width + columns, weights.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["row_count", "queries", "heads"])
def softmax_wide_kernel(
    x, mask, out, row_count, queries, heads, width, scale, stride_xb, stride_xh, stride_xq, stride_mb,
    stride_mh, stride_mq, stride_mk, CAUSAL: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One long row: maximum and sum in one pass (Milakov and Gimelshein, 2018), the weights in another."""
    row = tl.program_id(0).to(tl.int64)
    batch, head, query = row_of_matrix(row, row_count, queries, heads)
    last = None
    if CAUSAL:
        last = query + (width - queries)
    if mask is not None:
        mask += batch * stride_mb + head * stride_mh + query * stride_mq
    x_row = x + batch * stride_xb + head * stride_xh + query * stride_xq
    maximum = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        scores = load_scores(x_row, mask, columns, columns < width, last, scale, stride_mk)
        larger = tl.maximum(maximum, tl.max(scores, 0))
        subtracted = finite_maximum(larger)
        total *= tl.exp2((maximum - subtracted) * LOG2_E)
        total += tl.sum(tl.exp2((scores - subtracted) * LOG2_E), 0)
        maximum = larger
    subtracted = finite_maximum(maximum)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)
    for start in range(0, width, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < width
        scores = load_scores(x_row, mask, columns, valid, last, scale, stride_mk)
        weights = tl.exp2((scores - subtracted) * LOG2_E) * inverse
        tl.store(out + row * width + columns, weights.to(out.dtype.element_ty), mask=valid)


def softmax_forward(x: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool) -> torch.Tensor:
    """Softmax of scale * x over the last dimension, computed in float32; rows that see nothing are zeros.

    Args:
        x: [..., N] or, causal, [..., M, N]; float16, bfloat16 or float32.
        mask: bool, True = keep, broadcastable to x; what it hides is not read.
        scale: multiplies x.
        causal: row i sees columns up to i + N - M.

    Returns:
        Contiguous, of x's shape and dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        plan_softmax(x, mask, out, scale, causal, architecture_of(x.device), gpu_of(x.device)).run(x.device)
    return out


def plan_softmax(
    x: torch.Tensor,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    scale: float,
    causal: bool,
    architecture: str,
    gpu: str | None = None,
) -> Launch:
    """The launch of `softmax_forward`, writing into `out`."""
    element_bytes = x.element_size()
    x = _as_matrices(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous())
    batch, heads, queries, width = x.shape
    strides_mask: tuple[int | None, ...] = (None,) * 4
    if mask is not None:
        # Broadcast dimensions get stride 0: no copy.
        mask = _as_matrices(mask.expand(out.shape)).view(torch.uint8)
        strides_mask = mask.stride()
    rows = batch * heads * queries
    config = choose_norm_config(min(rows, MAX_BLOCK_ROWS), width, element_bytes, architecture, gpu, "softmax")
    arguments = dict(
        x=x,
        mask=mask,
        out=out,
        row_count=rows,
        queries=queries,
        heads=heads,
        width=width,
        scale=scale,
        stride_xb=x.stride(0),
        stride_xh=x.stride(1),
        stride_xq=x.stride(2),
        stride_mb=strides_mask[0],
        stride_mh=strides_mask[1],
        stride_mq=strides_mask[2],
        stride_mk=strides_mask[3],
        CAUSAL=causal,
        BLOCK_ROWS=config.block_rows,
        BLOCK_N=config.block_n,
    )
    kernel = softmax_wide_kernel if config.loop else softmax_rows_kernel
    return Launch(kernel, triton.cdiv(rows, config.block_rows), arguments, config.num_warps, num_stages=1)


def _as_matrices(x: torch.Tensor) -> torch.Tensor:
    """`x` as [B, H, M, N], a view; of more than four dimensions a copy where the leading ones do not fold."""
    if x.dim() <= 4:
        return x[(None,) * (4 - x.dim())]
    return x.reshape(prod(x.shape[:-3]), *x.shape[-3:])
