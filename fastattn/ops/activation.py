"""Bias and GELU in one pass: contract, reference and registration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu

from fastattn.backend import backend_for
from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, check_device, shape_of

__all__ = ["bias_gelu"]

APPROXIMATIONS = ("none", "tanh")


def bias_gelu(x: Tensor, bias: Tensor, approximate: str = "none") -> Tensor:
    """GELU of `x + bias`. Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        bias: [N]; cast to x's dtype.
        approximate: "none" for the error function, "tanh" for the paper's approximation.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: shapes or devices that do not fit, or an unknown approximation.

    Example:
        >>> import torch, fastattn
        >>> fastattn.ops.bias_gelu(torch.zeros(2, 4), torch.zeros(4))
        tensor([[0., 0., 0., 0.],
                [0., 0., 0., 0.]])
    """
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"bias_gelu: approximate is {approximate!r}; accepted are 'none' and 'tanh'")
    if x.dtype not in FLOAT_DTYPES or bias.dtype not in FLOAT_DTYPES:
        raise TypeError(f"bias_gelu: x is {x.dtype} and bias {bias.dtype}; accepted are {FLOAT_DTYPES}")
    check_device("bias_gelu", "x", x, "bias", bias)
    if x.dim() == 0 or bias.shape != x.shape[-1:]:
        raise ValueError(
            f"bias_gelu: x must be [..., N] and bias [N]; got {shape_of(x)} and {shape_of(bias)}"
        )
    compute = _in_pytorch if runs_in_pytorch(x) else _bias_gelu
    result: Tensor = compute(x, bias.to(x.dtype), approximate)
    return result


def bias_gelu_reference(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """`fastattn::bias_gelu` in plain PyTorch; computes in float32, or float64 where x is float64."""
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    return gelu(x.to(computing) + bias.to(computing), approximate=approximate).to(x.dtype)


def _forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    if backend_for(x.device) == "triton" and x.dtype != torch.float64:
        from fastattn_kernels.activation import bias_gelu_forward

        kernel_result: Tensor = bias_gelu_forward(x, bias, approximate)
        return kernel_result
    return _in_pytorch(x, bias, approximate)


def _in_pytorch(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    total = torch.add(x, bias).contiguous()
    if total.requires_grad:
        return gelu(total, approximate=approximate)
    # In place on the sum: one allocation and one pass fewer.
    result: Tensor = torch.ops.aten.gelu_(total, approximate=approximate)
    return result


def _fake(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


_bias_gelu = register(
    "bias_gelu",
    "Tensor x, Tensor bias, str approximate",
    "Tensor",
    forward=_forward,
    fake=_fake,
    reference=bias_gelu_reference,
)
