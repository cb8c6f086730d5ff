"""Bias and GELU in one pass over memory: device code and launch. Arguments come validated."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .activation_config import choose_pointwise_config
from .norm import as_rows

__all__ = ["bias_gelu_forward", "plan_bias_gelu"]


@triton.jit
def gelu(x, TANH: tl.constexpr):
    """GELU of float32 values (Hendrycks and Gimpel, 2016), exact or by their tanh approximation."""
    if TANH:
        # (1 + tanh(u)) / 2 is the logistic function of 2u: no cancellation, and exp overflows to the right
        # limit.
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit(do_not_specialize=["row_count"])
def bias_gelu_kernel(
    x, bias, out, row_count, stride_x,
    WIDTH: tl.constexpr, TANH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of gelu(x + bias)."""
    column_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0).to(tl.int64)
    rows = block // column_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = (block % column_blocks).to(tl.int32) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    valid = (rows < row_count) & (columns < WIDTH)
    tile = tl.load(x + rows * stride_x + columns, mask=valid, other=0.0)
    biased = tile.to(tl.float32) + tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + rows * WIDTH + columns, gelu(biased, TANH).to(tile.dtype), mask=valid)


def bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(x + bias), computed in float32.

    Args:
        x: [..., N], float16, bfloat16 or float32, any strides (rows not contiguous in themselves are copied).
        bias: [N].
        approximate: "none" (by erf) or "tanh".

    Returns:
        Contiguous, of x's shape and dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        plan_bias_gelu(x, bias, out, approximate).run(x.device)
    return out


def plan_bias_gelu(x: torch.Tensor, bias: torch.Tensor, out: torch.Tensor, approximate: str) -> Launch:
    """The launch of `bias_gelu_forward`, writing into `out`."""
    x = as_rows(x)
    rows, width = x.shape
    config = choose_pointwise_config(width)
    arguments = dict(
        x=x,
        bias=bias.contiguous(),
        out=out,
        row_count=rows,
        stride_x=x.stride(0),
        WIDTH=width,
        TANH=approximate == "tanh",
        BLOCK_ROWS=config.block_rows,
        BLOCK_N=config.block_n,
    )
    programs = triton.cdiv(rows, config.block_rows) * triton.cdiv(width, config.block_n)
    return Launch(bias_gelu_kernel, programs, arguments, config.num_warps, num_stages=1)
