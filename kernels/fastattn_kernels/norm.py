"""Layer and RMS norms, with residual addition, dropout and quantized output.

Arguments come validated. Rows not contiguous in themselves are copied; rows may lie anywhere.
"""

from __future__ import annotations

import torch

from ._launch import architecture_of
from ._tuned import gpu_of
from .norm_plan import QUANTIZED_DTYPES, plan_norm

__all__ = [
    "add_layer_norm_forward",
    "add_layer_norm_quantized_forward",
    "add_rms_norm_forward",
    "add_rms_norm_quantized_forward",
    "layer_norm_forward",
    "rms_norm_forward",
]

Tensor = torch.Tensor


def layer_norm_forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the last dimension, statistics in float32.

    Args:
        x: [..., N], float16, bfloat16 or float32.
        weight, bias: [N] or None.
        eps: added to the variance.

    Returns:
        Contiguous, of x's shape and dtype.
    """
    return _run(x, None, weight, bias, eps=eps)[0]


def rms_norm_forward(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """RMS normalization over the last dimension; `offset` is added to the weight. As `layer_norm_forward`."""
    return _run(x, None, weight, None, eps=eps, offset=offset, rms=True)[0]


def add_layer_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Layer normalization of residual + dropout(x) over the last dimension, statistics in float32.

    Args:
        x: [..., N], float16, bfloat16 or float32.
        residual: x's shape and dtype.
        weight, bias: [N] or None.
        eps: added to the variance.
        dropout_p: probability that an element of x is dropped; needs `seed`.
        seed: int64 [1].

    Returns:
        (normalized, sum), both contiguous, of x's shape and dtype; the norm of the rounded sum, as unfused.
    """
    out, total, _ = _run(x, residual, weight, bias, eps=eps, dropout_p=dropout_p, seed=seed)
    assert total is not None
    return out, total


def add_rms_norm_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """RMS normalization of residual + dropout(x); `offset` is added to the weight. As
    `add_layer_norm_forward`.
    """
    out, total, _ = _run(
        x, residual, weight, None, eps=eps, offset=offset, rms=True, dropout_p=dropout_p, seed=seed
    )
    assert total is not None
    return out, total


def add_layer_norm_quantized_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    quantize: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_layer_norm_forward` with the norm, unrounded, as int8 or fp8 (e4m3fn) and a scale a row.

    Returns:
        (quantized [..., N], scales float32 [..., 1], sum).
    """
    out, total, scales = _run(
        x, residual, weight, bias, eps=eps, dropout_p=dropout_p, seed=seed, quantize=quantize
    )
    assert total is not None and scales is not None
    return out, scales, total


def add_rms_norm_quantized_forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float,
    dropout_p: float,
    seed: Tensor | None,
    quantize: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`add_rms_norm_forward`, quantized as `add_layer_norm_quantized_forward`."""
    out, total, scales = _run(
        x, residual, weight, None, eps=eps, offset=offset, rms=True, dropout_p=dropout_p, seed=seed,
        quantize=quantize,
    )  # fmt: skip
    assert total is not None and scales is not None
    return out, scales, total


def _run(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    offset: float = 0.0,
    rms: bool = False,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    quantize: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(out, the sum where there is a residual, scales where quantized)."""
    dtype = x.dtype if quantize is None else QUANTIZED_DTYPES[quantize]
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scales = None
    if quantize is not None:
        # Ones where a row has no elements and nothing is launched.
        scales = torch.ones(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    if x.numel():
        plan_norm(
            x, residual, weight, bias, out, total, scales, eps=eps, offset=offset, rms=rms,
            dropout_p=dropout_p, seed=seed, quantize=quantize, architecture=architecture_of(x.device),
            gpu=gpu_of(x.device),
        ).run(x.device)  # fmt: skip
    return out, total, scales
