"""Bias and GELU, and gated activations, each in one pass: contract, reference and registration."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from fastattn.backend import backend_for
from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, check_device, check_same, shape_of

__all__ = ["bias_gelu", "gated_activation"]

APPROXIMATIONS = ("none", "tanh")
KINDS = ("silu", "gelu", "gelu_tanh")


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
    compute = _bias_gelu_in_pytorch if runs_in_pytorch(x) else _bias_gelu
    result: Tensor = compute(x, bias.to(x.dtype), approximate)
    return result


def gated_activation(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """`activation(gate) * up`. Shazeer, "GLU Variants Improve Transformer" (2020), equation 5.

    Computed in float32; autocast leaves the arguments alone.

    Args:
        gate: [..., N], float16, bfloat16, float32 or float64; may be half of a wider product, which is not
            copied.
        up: gate's shape and dtype.
        kind: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU, by the error function or its tanh approximation).

    Returns:
        gate's shape and dtype.

    Raises:
        TypeError: dtypes that are not floating point or do not agree.
        ValueError: shapes or devices that do not fit, or an unknown kind.

    Example:
        >>> import torch, fastattn
        >>> gate, up = torch.tensor([[0.0, 20.0, 3.0, 4.0]]).chunk(2, -1)
        >>> fastattn.ops.gated_activation(gate, up)
        tensor([[ 0., 80.]])
    """
    if kind not in KINDS:
        raise ValueError(f"gated_activation: kind is {kind!r}; accepted are 'silu', 'gelu' and 'gelu_tanh'")
    check_same("gated_activation", "gate", gate, "up", up)
    if gate.dim() == 0 or gate.shape != up.shape:
        raise ValueError(
            f"gated_activation: gate and up must have one shape [..., N]; "
            f"got {shape_of(gate)} and {shape_of(up)}"
        )
    compute = _gated_in_pytorch if runs_in_pytorch(gate) else _gated_activation
    result: Tensor = compute(gate, up, kind)
    return result


def bias_gelu_reference(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    """`fastattn::bias_gelu` in plain PyTorch; computes in float32, or float64 where x is float64."""
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    return gelu(x.to(computing) + bias.to(computing), approximate=approximate).to(x.dtype)


def _bias_gelu_forward(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    if backend_for(x.device) == "triton" and x.dtype != torch.float64:
        from fastattn_kernels.activation import bias_gelu_forward

        kernel_result: Tensor = bias_gelu_forward(x, bias, approximate)
        return kernel_result
    return _bias_gelu_in_pytorch(x, bias, approximate)


def _bias_gelu_in_pytorch(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    total = torch.add(x, bias).contiguous()
    if total.requires_grad:
        return gelu(total, approximate=approximate)
    # In place on the sum: one allocation and one pass fewer.
    result: Tensor = torch.ops.aten.gelu_(total, approximate=approximate)
    return result


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


_bias_gelu = register(
    "bias_gelu",
    "Tensor x, Tensor bias, str approximate",
    "Tensor",
    forward=_bias_gelu_forward,
    fake=_fake,
    reference=bias_gelu_reference,
)


def gated_activation_reference(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """`fastattn::gated_activation` in plain PyTorch; computes in float32, or float64 where gate is
    float64.
    """
    computing = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (_activated(gate.to(computing), kind) * up.to(computing)).to(gate.dtype)


def _activated(x: Tensor, kind: str) -> Tensor:
    return silu(x) if kind == "silu" else gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def _gated_forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    if backend_for(gate.device) == "triton" and gate.dtype != torch.float64:
        from fastattn_kernels.activation import gated_activation_forward

        kernel_result: Tensor = gated_activation_forward(gate, up, kind)
        return kernel_result
    return _gated_in_pytorch(gate, up, kind).contiguous()


def _gated_in_pytorch(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    activated = _activated(gate, kind)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return activated * up
    # In place on what nobody else has seen.
    return activated.mul_(up)


_gated_activation = register(
    "gated_activation",
    "Tensor gate, Tensor up, str kind",
    "Tensor",
    forward=_gated_forward,
    fake=_fake,
    reference=gated_activation_reference,
)
