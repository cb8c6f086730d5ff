"""Residual addition and layer normalization in one pass: contract, reference and registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from fastattn.backend import backend_for
from fastattn.ops.dropout import keep_mask
from fastattn.ops.registration import draw_seed, register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, check_device, check_dropout, shape_of

__all__ = ["add_layer_norm"]


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Layer normalization of `residual + dropout(x)` over the last dimension, and that sum itself.

    Ba et al., "Layer Normalization" (2016), equation 4; statistics in float32.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        residual: the shape of x. Where the dtypes of x and residual differ, both are promoted, as addition
            does.
        weight, bias: [N] or None.
        eps: added to the variance.
        dropout_p: probability of dropping an element of x, in [0, 1].

    Returns:
        normalized and sum, both of x's shape and the promoted dtype.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: shapes or devices that do not fit.

    Example:
        >>> import torch, fastattn
        >>> x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        >>> normalized, total = fastattn.ops.add_layer_norm(x, residual, torch.ones(8), None, 1e-5)
        >>> torch.equal(total, residual + x)
        True
    """
    if x.shape != residual.shape or x.dim() == 0:
        raise ValueError(
            f"add_layer_norm: x and residual must have one shape [..., N]; "
            f"got {shape_of(x)} and {shape_of(residual)}"
        )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        check_device("add_layer_norm", "x", x, name, tensor)
        if name != "residual" and tensor.shape != x.shape[-1:]:
            raise ValueError(f"add_layer_norm: {name} must be [{x.shape[-1]}]; got {shape_of(tensor)}")
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"add_layer_norm: {name} is {tensor.dtype}; accepted are {FLOAT_DTYPES}")
    check_dropout("add_layer_norm", dropout_p)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    compute = _in_pytorch if runs_in_pytorch(x) else _add_layer_norm
    normalized, total = compute(
        x.to(dtype), residual.to(dtype), weight, bias, eps, dropout_p, draw_seed(dropout_p, x.device)
    )
    return normalized, total


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastattn::add_layer_norm` in plain PyTorch; computes in float32, or float64 where x is float64."""
    if dropout_p > 0.0 and seed is not None:
        rows = torch.arange(x.numel() // max(1, x.shape[-1]), device=x.device).view(x.shape[:-1])
        keep = keep_mask(seed, rows, x.shape[-1], dropout_p)
        x = x * keep / (1.0 - dropout_p) if dropout_p < 1.0 else x * 0.0
    total = residual + x
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    normalized = layer_norm(
        total.to(computing),
        x.shape[-1:],
        None if weight is None else weight.to(computing),
        None if bias is None else bias.to(computing),
        eps,
    )
    return normalized.to(x.dtype), total


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if backend_for(x.device) == "triton" and x.dtype != torch.float64:
        from fastattn_kernels.norm import add_layer_norm_forward

        kernel_result: tuple[Tensor, Tensor] = add_layer_norm_forward(x, *rest)
        return kernel_result
    return _in_pytorch(x, *rest)


def _in_pytorch(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    same_dtype = all(p is None or p.dtype == x.dtype for p in (weight, bias))
    if dropout_p == 0.0 and same_dtype:
        total = torch.add(residual, x).contiguous()
        return layer_norm(total, x.shape[-1:], weight, bias, eps), total
    normalized, total = add_layer_norm_reference(x, residual, weight, bias, eps, dropout_p, seed)
    return normalized.contiguous(), total.contiguous()


def _fake(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_add_layer_norm = register(
    "add_layer_norm",
    "Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed",
    "(Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    reference=add_layer_norm_reference,
)
