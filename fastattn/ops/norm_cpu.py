"""The norms as PyTorch's own calls, differentiated by PyTorch: what runs on a CPU, outside graphs.

Where the dtypes differ, or dropout must be the kernels', the reference runs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from fastattn.ops.norm_reference import (
    add_layer_norm_reference,
    add_rms_norm_reference,
    layer_norm_reference,
    rms_norm_reference,
)

__all__ = [
    "add_layer_norm_in_pytorch",
    "add_rms_norm_in_pytorch",
    "layer_norm_in_pytorch",
    "rms_norm_in_pytorch",
]


def layer_norm_in_pytorch(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    if all(p is None or p.dtype == x.dtype for p in (weight, bias)):
        # PyTorch's own statistics are float32 in half precision; under autocast it may return float32.
        return layer_norm(x, x.shape[-1:], weight, bias, eps).to(x.dtype)
    return layer_norm_reference(x, weight, bias, eps)


def rms_norm_in_pytorch(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    if weight is None or weight.dtype == x.dtype:
        if offset == 0.0:
            return rms_norm(x, x.shape[-1:], weight, eps).to(x.dtype)
        if weight is not None and x.dtype in (torch.float32, torch.float64):
            return rms_norm(x, x.shape[-1:], weight + offset, eps)
    return rms_norm_reference(x, weight, eps, offset)


def add_layer_norm_in_pytorch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if dropout_p > 0.0:
        return add_layer_norm_reference(x, residual, weight, bias, eps, dropout_p, seed)
    total = torch.add(residual, x)
    return layer_norm_in_pytorch(total, weight, bias, eps), total


def add_rms_norm_in_pytorch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if dropout_p > 0.0:
        return add_rms_norm_reference(x, residual, weight, eps, offset, dropout_p, seed)
    total = torch.add(residual, x)
    return rms_norm_in_pytorch(total, weight, eps, offset), total
