"""Residual addition and the norm after it as one module: `forward(x, residual) -> (normalized, sum)`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastattn import ops

__all__ = ["AddLayerNorm", "AddRMSNorm"]


class AddLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` of `residual + dropout(x)`, in one operation; also returns that sum.

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype: as `torch.nn.LayerNorm` takes them,
        with its
            parameters.
        dropout: probability of dropping an element of x, in training.

    Shape:
        x and residual [..., *normalized_shape] -> two tensors of that shape, (normalized, sum).

    Raises:
        ValueError: dropout outside [0, 1]; shapes that do not fit.

    Example:
        >>> import torch, fastattn
        >>> norm = fastattn.layers.AddLayerNorm(8)
        >>> normalized, total = norm(torch.ones(2, 8), torch.ones(2, 8))
        >>> total[0, 0].item()
        2.0
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self.dropout = _checked(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight, bias = (None if p is None else p.flatten() for p in (self.weight, self.bias))
        dropout_p = self.dropout if self.training else 0.0
        rows, onto = _rows(self, x, residual)
        normalized, total = ops.add_layer_norm(rows, onto, weight, bias, self.eps, dropout_p)
        return normalized.view(x.shape), total.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


class AddRMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` of `residual + dropout(x)`, in one operation; also returns that sum.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as `torch.nn.RMSNorm` takes them, with its
            parameters; eps None is the smallest step of x's dtype above 1.
        dropout: probability of dropping an element of x, in training.

    Shape:
        x and residual [..., *normalized_shape] -> two tensors of that shape, (normalized, sum).

    Raises:
        ValueError: dropout outside [0, 1]; shapes that do not fit.

    Example:
        >>> import torch, fastattn
        >>> norm = fastattn.layers.AddRMSNorm(8, dropout=0.1).eval()
        >>> normalized, total = norm(torch.ones(2, 8), torch.zeros(2, 8))
        >>> normalized[0, 0].item()
        1.0
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.dropout = _checked(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight = None if self.weight is None else self.weight.flatten()
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        dropout_p = self.dropout if self.training else 0.0
        rows, onto = _rows(self, x, residual)
        normalized, total = ops.add_rms_norm(rows, onto, weight, eps, dropout_p)
        return normalized.view(x.shape), total.view(x.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def _checked(dropout: float) -> float:
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout is {dropout}; it must lie in [0, 1]")
    return dropout


def _rows(norm: nn.LayerNorm | nn.RMSNorm, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the normalized dimensions made one, which is what the operations normalize."""
    shape = tuple(norm.normalized_shape)
    if tuple(x.shape[-len(shape) :]) != shape or residual.shape != x.shape:
        raise ValueError(
            f"x and residual must both be [..., {', '.join(map(str, shape))}]; "
            f"got {list(x.shape)} and {list(residual.shape)}"
        )
    return (x, residual) if len(shape) == 1 else (x.flatten(-len(shape)), residual.flatten(-len(shape)))
