"""A linear layer by a quantized weight: contract and registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.packed_weight import PackedWeight
from fastattn.ops.quantized_linear_cpu import quantized_linear_cpu, quantized_linears_cpu
from fastattn.ops.quantized_linear_reference import ACTIVATIONS, quantized_linear_reference
from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, autocast, check_device, shape_of

__all__ = ["quantized_linear", "quantized_linears"]


def quantized_linear(
    x: Tensor, packed_weight: PackedWeight, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """`activation(x @ W^T + bias)` by a quantized weight.

    "int8" and "fp8" quantize every row of x, too, by its largest magnitude over 127 or 448; the products of
    int8 are summed exactly. "int8-weight" and "int4-weight" multiply x itself, as accurately as its dtype
    does. Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale" (2022), section
    2; Yao et al., "ZeroQuant" (2022), section 4.

    A row of zeros gives the bias, a row with an infinity or NaN gives NaN, in that row alone. Gradients reach
    x, as if it had not been rounded, and the bias; the weight has none. Follows autocast. On a CPU the kernel
    depends on the number of rows and the instructions (see `ops/quantized_linear_cpu.py`); a GPU dequantizes.

    Args:
        x: [..., K], float16, bfloat16, float32 or float64.
        packed_weight: [N, K], quantized.
        bias: [N], floating point, added in float32; or None.
        activation: None, "gelu" (by the error function), "gelu_tanh", "relu" or "silu".

    Returns:
        [..., N] in x's dtype, under autocast in autocast's.

    Raises:
        TypeError: x or bias that are not floating point, or a weight that is no `PackedWeight`.
        ValueError: shapes or devices that do not fit, or an unknown activation.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.quantize_absmax(torch.eye(3), "int8")
        >>> fastattn.ops.quantized_linear(torch.tensor([[0.0, 127.0, -2.0]]), packed, torch.ones(3))
        tensor([[  1., 128.,  -1.]])
    """
    if not isinstance(packed_weight, PackedWeight):
        raise TypeError(
            f"quantized_linear: packed_weight is a {type(packed_weight).__name__}; it must be a "
            "PackedWeight, which quantize_absmax makes of a tensor"
        )
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(
            f"quantized_linear: activation is {activation!r}; accepted are None, "
            f"{', '.join(map(repr, ACTIVATIONS))}"
        )
    if x.dtype not in FLOAT_DTYPES or (bias is not None and bias.dtype not in FLOAT_DTYPES):
        raise TypeError(
            f"quantized_linear: x is {x.dtype} and bias {None if bias is None else bias.dtype}; "
            f"accepted are {FLOAT_DTYPES}"
        )
    if x.dim() == 0 or x.shape[-1] != packed_weight.in_features:
        raise ValueError(
            f"quantized_linear: x must be [..., {packed_weight.in_features}], the weight's columns; "
            f"got {shape_of(x)}"
        )
    if bias is not None and tuple(bias.shape) != (packed_weight.out_features,):
        raise ValueError(
            f"quantized_linear: bias must be [{packed_weight.out_features}]; got {shape_of(bias)}"
        )
    for name, tensor in (("packed_weight", packed_weight.values), ("bias", bias)):
        if tensor is not None:
            check_device("quantized_linear", "x", x, name, tensor)
    (x,) = autocast(x)
    if runs_in_pytorch(x) and not _needs_gradient(x, bias):
        return _compute(x, packed_weight, bias, activation)
    result: Tensor = _quantized_linear(x, *_arguments(packed_weight, bias), activation)
    return result


def quantized_linears(
    x: Tensor, packed_weights: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """`quantized_linear` of one x by several weights, the query, key and value projections say: the same
    numbers, and where a CPU rounds the rows of x to int8, it does so once.

    Args:
        x: [..., K].
        packed_weights: each [N_i, K].
        biases: one a weight, each [N_i] or None.

    Returns:
        one tensor [..., N_i] a weight.

    Raises:
        TypeError, ValueError: as `quantized_linear`.

    Example:
        >>> import torch, fastattn
        >>> query = key = fastattn.ops.quantize_absmax(torch.eye(3), "int8")
        >>> x, bias = torch.ones(1, 3), torch.ones(3)
        >>> fastattn.ops.quantized_linears(x, [query, key], [None, bias])[1]
        tensor([[2., 2., 2.]])
    """
    fits = all(each.in_features == x.shape[-1] and each.device == x.device for each in packed_weights)
    plain = runs_in_pytorch(x) and x.is_cpu and not torch.is_autocast_enabled("cpu")
    if fits and plain and x.dtype in FLOAT_DTYPES and not any(_needs_gradient(x, bias) for bias in biases):
        shared = quantized_linears_cpu(x, packed_weights, biases)
        if shared is not None:
            return shared
    return [quantized_linear(x, packed, bias) for packed, bias in zip(packed_weights, biases, strict=True)]


def _needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def _compute(x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None) -> Tensor:
    face = quantized_linear_cpu if x.is_cpu else quantized_linear_reference
    if torch.is_autocast_enabled(x.device.type):
        # x has autocast's dtype already; products inside choose theirs.
        with torch.autocast(x.device.type, enabled=False):
            return face(x, packed, bias, activation)
    return face(x, packed, bias, activation)


def _arguments(packed: PackedWeight, bias: Tensor | None) -> tuple[Any, ...]:
    """The registered schema's arguments after x, without the activation. float8 numbers go as bytes: tracing
    and its checks know what to do with those.
    """
    values = packed.values.view(torch.int8) if packed.scheme == "fp8" else packed.values
    return (
        values, packed.scales, packed.zero_points, packed.input_scales, bias,
        packed.scheme, packed.in_features, packed.group_size, packed.layout,
    )  # fmt: skip


def _packed(
    values: Tensor, scales: Tensor, zero_points: Tensor | None, input_scales: Tensor | None,
    scheme: str, in_features: int, group_size: int, layout: str,
) -> PackedWeight:  # fmt: skip
    numbers = values.view(torch.float8_e4m3fn) if scheme == "fp8" else values
    return PackedWeight(numbers, scales, scheme, in_features, group_size, zero_points, input_scales, layout)


def _forward(
    x: Tensor, values: Tensor, scales: Tensor, zero_points: Tensor | None, input_scales: Tensor | None,
    bias: Tensor | None, scheme: str, in_features: int, group_size: int, layout: str, activation: str | None,
) -> Tensor:  # fmt: skip
    packed = _packed(values, scales, zero_points, input_scales, scheme, in_features, group_size, layout)
    return _compute(x, packed, bias, activation).contiguous()


def _fake(x: Tensor, values: Tensor, *rest: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, values, scales, zero_points, input_scales, bias, *ctx.constants, ctx.activation = inputs
    # x is kept only where the derivative depends on it.
    kept = x if ctx.activation is not None else None
    ctx.save_for_backward(kept, values, scales, zero_points, input_scales, bias)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Y = f(X W^T + b): dX = (dY f') W, db = the sum of dY f' over the rows. Rounding X counts as nothing
    (straight through; Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013).
    """
    x, values, scales, zero_points, input_scales, bias = ctx.saved_tensors
    packed = _packed(values, scales, zero_points, input_scales, *ctx.constants)
    if ctx.activation is not None:
        with torch.no_grad():
            before = _quantized_linear(x, *_arguments(packed, bias), None)
        grad = _activation_backward(grad, before, ctx.activation)
    rows = grad.reshape(-1, grad.shape[-1])
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = (rows @ packed.dequantize(grad.dtype)).view(*grad.shape[:-1], packed.in_features)
    if ctx.needs_input_grad[5]:
        computing = torch.float64 if rows.dtype == torch.float64 else torch.float32
        grad_bias = rows.sum(0, dtype=computing).to(ctx.bias_dtype)
    return (grad_x, None, None, None, None, grad_bias, None, None, None, None, None)


def _activation_backward(grad: Tensor, before: Tensor, activation: str) -> Tensor:
    """The gradient of `activated(before, activation)`."""
    if activation == "relu":
        return torch.where(before > 0, grad, 0.0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, before)  # type: ignore[no-any-return]
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, before, approximate=approximate)  # type: ignore[no-any-return]


_quantized_linear = register(
    "quantized_linear",
    "Tensor x, Tensor values, Tensor scales, Tensor? zero_points, Tensor? input_scales, Tensor? bias, "
    "str scheme, SymInt in_features, int group_size, str layout, str? activation",
    "Tensor",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
