"""Bias and GELU, and gated activations, each in one pass: device code and launch. Arguments come validated.

Rows may lie anywhere; those not contiguous in themselves are copied.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import Launch, architecture_of
from ._rows import as_rows, row_offsets, row_strides
from ._tuned import gpu_of
from .activation_config import choose_pointwise_config

__all__ = ["bias_gelu_forward", "gated_activation_forward", "plan_bias_gelu", "plan_gated_activation"]


@triton.jit
def activated(x, KIND: tl.constexpr):
    """SiLU or GELU of float32 values (Hendrycks and Gimpel, 2016), exact or by their tanh approximation."""
    if KIND == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the logistic function of 2u: no cancellation, and exp overflows to the right
        # limit.
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        return x / (1.0 + tl.exp(-x))


@triton.jit
def tile_of_program(row_count, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's int64 rows, its columns, and which elements exist."""
    column_blocks: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0)
    rows = (block // column_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    columns = block % column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return rows, columns, (rows < row_count) & (columns < WIDTH)


@triton.jit(do_not_specialize=["row_count"])
def bias_gelu_kernel(
    x, bias, out, row_count, inner, stride_x_outer, stride_x,
    WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of activation(x + bias)."""
    rows, columns, valid = tile_of_program(row_count, WIDTH, BLOCK_ROWS, BLOCK_N)
    offsets = row_offsets(rows, row_count, inner, stride_x_outer, stride_x)
    tile = tl.load(x + offsets + columns, mask=valid, other=0.0)
    biased = tile.to(tl.float32) + tl.load(bias + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    tl.store(out + rows * WIDTH + columns, activated(biased, KIND).to(tile.dtype), mask=valid)


@triton.jit(do_not_specialize=["row_count"])
def gated_activation_kernel(
    gate, up, out, row_count, inner, stride_gate_outer, stride_gate, stride_up_outer, stride_up,
    WIDTH: tl.constexpr, KIND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of activation(gate) * up."""
    rows, columns, valid = tile_of_program(row_count, WIDTH, BLOCK_ROWS, BLOCK_N)
    offsets_gate = row_offsets(rows, row_count, inner, stride_gate_outer, stride_gate)
    offsets_up = row_offsets(rows, row_count, inner, stride_up_outer, stride_up)
    tile = tl.load(gate + offsets_gate + columns, mask=valid, other=0.0)
    factor = tl.load(up + offsets_up + columns, mask=valid, other=0.0).to(tl.float32)
    result = activated(tile.to(tl.float32), KIND) * factor
    tl.store(out + rows * WIDTH + columns, result.to(tile.dtype), mask=valid)


def bias_gelu_forward(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu(x + bias), computed in float32.

    Args:
        x: [..., N], float16, bfloat16 or float32.
        bias: [N].
        approximate: "none" (by erf) or "tanh".

    Returns:
        Contiguous, of x's shape and dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel():
        architecture, gpu = architecture_of(x.device), gpu_of(x.device)
        plan_bias_gelu(x, bias, out, approximate, architecture, gpu).run(x.device)
    return out


def plan_bias_gelu(
    x: torch.Tensor,
    bias: torch.Tensor,
    out: torch.Tensor,
    approximate: str,
    architecture: str,
    gpu: str | None = None,
) -> Launch:
    """The launch of `bias_gelu_forward`, writing into `out`."""
    (x,) = as_rows(x)
    inner, stride_x_outer, stride_x = row_strides(x)
    arguments = dict(
        x=x,
        bias=bias.contiguous(),
        out=out,
        inner=inner,
        stride_x_outer=stride_x_outer,
        stride_x=stride_x,
        KIND="gelu_tanh" if approximate == "tanh" else "gelu",
    )
    return _tiled(bias_gelu_kernel, x, arguments, architecture, gpu)


def gated_activation_forward(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    """activation(gate) * up, computed in float32.

    Args:
        gate: [..., N], float16, bfloat16 or float32.
        up: gate's shape and dtype; both may be views of one tensor.
        kind: "silu", "gelu" or "gelu_tanh".

    Returns:
        Contiguous, of gate's shape and dtype.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if gate.numel():
        architecture, gpu = architecture_of(gate.device), gpu_of(gate.device)
        plan_gated_activation(gate, up, out, kind, architecture, gpu).run(gate.device)
    return out


def plan_gated_activation(
    gate: torch.Tensor,
    up: torch.Tensor,
    out: torch.Tensor,
    kind: str,
    architecture: str,
    gpu: str | None = None,
) -> Launch:
    """The launch of `gated_activation_forward`, writing into `out`."""
    gate, up = as_rows(gate, up)
    inner, stride_gate_outer, stride_gate = row_strides(gate)
    _, stride_up_outer, stride_up = row_strides(up)
    arguments = dict(
        gate=gate,
        up=up,
        out=out,
        inner=inner,
        stride_gate_outer=stride_gate_outer,
        stride_gate=stride_gate,
        stride_up_outer=stride_up_outer,
        stride_up=stride_up,
        KIND=kind,
    )
    return _tiled(gated_activation_kernel, gate, arguments, architecture, gpu)


def _tiled(
    kernel: Any, x: torch.Tensor, arguments: dict[str, Any], architecture: str, gpu: str | None
) -> Launch:
    """`kernel` over tiles of `x` [outer, inner, N]."""
    outer, inner, width = x.shape
    config = choose_pointwise_config(width, architecture, gpu)
    sizes = dict(row_count=outer * inner, WIDTH=width, BLOCK_ROWS=config.block_rows, BLOCK_N=config.block_n)
    programs = triton.cdiv(outer * inner, config.block_rows) * triton.cdiv(width, config.block_n)
    return Launch(kernel, programs, arguments | sizes, config.num_warps, num_stages=1)
