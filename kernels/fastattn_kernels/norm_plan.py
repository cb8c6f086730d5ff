"""The launch of every norm: the kernels of norm_kernel.py with arguments and choices."""

from __future__ import annotations

import torch
import triton

from ._dropout import dropout_constants
from ._launch import Launch
from ._rows import as_rows, row_strides
from .norm_config import MAX_BLOCK_ROWS, choose_norm_config
from .norm_kernel import norm_rows_kernel, norm_wide_kernel

__all__ = ["QUANTIZED_DTYPES", "plan_norm"]

Tensor = torch.Tensor
QUANTIZED_DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def plan_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    total: Tensor | None,
    scales: Tensor | None,
    *,
    eps: float,
    architecture: str,
    gpu: str | None = None,
    offset: float = 0.0,
    rms: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    quantize: str | None = None,
) -> Launch:
    """The launch of any norm of norm.py.

    Args:
        x, residual, weight, bias: as there; without `residual` nothing is added and `total` is None.
        out: contiguous, of x's shape; its dtype is x's, or that of `quantize` with `scales` float32 [..., 1].
        total: contiguous, of x's shape and dtype.
        rms: whether the mean stays in; an RMS norm has no bias.
        architecture, gpu: as `architecture_of` and `gpu_of` name them.
    """
    views = as_rows(x) if residual is None else as_rows(x, residual)
    inner, stride_x_outer, stride_x = row_strides(views[0])
    rows, width = views[0].shape[0] * views[0].shape[1], views[0].shape[2]
    config = choose_norm_config(min(rows, MAX_BLOCK_ROWS), width, x.element_size(), architecture, gpu)
    threshold, keep_scale = dropout_constants(dropout_p)
    arguments = dict(
        x=views[0],
        residual=None if residual is None else views[1],
        weight=None if weight is None else weight.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        out=out.view(torch.uint8) if quantize == "fp8" else out,
        total=total,
        scales=scales,
        seed=seed if dropout_p > 0.0 else None,
        row_count=rows,
        eps=eps,
        offset=offset,
        threshold=threshold,
        keep_scale=keep_scale,
        inner=inner,
        stride_x_outer=stride_x_outer,
        stride_x=stride_x,
        stride_residual_outer=None if residual is None else views[1].stride(0),
        stride_residual=None if residual is None else views[1].stride(1),
        WIDTH=width,
        RMS=rms,
        QUANTIZE=quantize,
        BLOCK_ROWS=config.block_rows,
        BLOCK_N=config.block_n,
    )
    kernel = norm_wide_kernel if config.loop else norm_rows_kernel
    return Launch(kernel, triton.cdiv(rows, config.block_rows), arguments, config.num_warps, num_stages=1)
