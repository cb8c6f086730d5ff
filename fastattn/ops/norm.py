"""Layer and RMS normalization, alone and after a residual addition: contract and registration.

Statistics, weight and bias are applied in float32 and the result is rounded once. Autocast leaves the
arguments alone: half-precision rows come out in half precision, no less exact for it.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from fastattn.backend import backend_for
from fastattn.ops.norm_cpu import (
    add_layer_norm_in_pytorch,
    add_rms_norm_in_pytorch,
    layer_norm_in_pytorch,
    rms_norm_in_pytorch,
)
from fastattn.ops.norm_reference import (
    QUANTIZED,
    add_layer_norm_quantized_reference,
    add_layer_norm_reference,
    add_rms_norm_quantized_reference,
    add_rms_norm_reference,
    layer_norm_reference,
    rms_norm_reference,
)
from fastattn.ops.registration import draw_seed, register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, check_device, check_dropout, shape_of

__all__ = ["add_layer_norm", "add_rms_norm", "layer_norm", "rms_norm"]

Quantization = Literal["int8", "fp8"]


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer normalization over the last dimension. Ba et al., "Layer Normalization" (2016), equation 4.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        weight, bias: [N], floating point of any dtype, or None.
        eps: added to the variance, at least 0.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: shapes or devices that do not fit, or a negative eps.

    Example:
        >>> import torch, fastattn
        >>> fastattn.ops.layer_norm(torch.tensor([[1.0, 3.0]]), None, None, 0.0)
        tensor([[-1.,  1.]])
    """
    _check("layer_norm", x, None, weight, bias, eps)
    compute = layer_norm_in_pytorch if runs_in_pytorch(x) else _layer_norm
    result: Tensor = compute(x, weight, bias, eps)
    return result


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * (weight + offset)` over the last dimension.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4. Rounded once, at the end:
    Llama as transformers writes it rounds before the weight, too, and is that much further from the exact
    result.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        weight: [N], floating point of any dtype, or None.
        eps: added to the mean square, at least 0.
        offset: added to the weight, in float32: 1.0 for Gemma, whose weights are stored about zero.

    Returns:
        x's shape and dtype.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: shapes or devices that do not fit, a negative eps, or an offset without a weight.

    Example:
        >>> import torch, fastattn
        >>> fastattn.ops.rms_norm(torch.tensor([[3.0, -3.0]]), torch.ones(2), 0.0, offset=1.0)
        tensor([[ 2., -2.]])
    """
    _check("rms_norm", x, None, weight, None, eps, offset)
    compute = rms_norm_in_pytorch if runs_in_pytorch(x) else _rms_norm
    result: Tensor = compute(x, weight, eps, offset)
    return result


@overload
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout_p: float = 0.0, quantize: None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
    dropout_p: float = 0.0, *, quantize: Quantization,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    quantize: Quantization | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """Layer normalization of `residual + dropout(x)` over the last dimension, and that sum itself.

    Ba et al., "Layer Normalization" (2016), equation 4.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        residual: the shape of x. Where the dtypes of x and residual differ, both are promoted, as addition
            does.
        weight, bias: [N], floating point of any dtype, or None.
        eps: added to the variance, at least 0.
        dropout_p: probability of dropping an element of x, in [0, 1].
        quantize: "int8" or "fp8" (torch.float8_e4m3fn) for normalized rows in that dtype, each with a scale.

    Returns:
        normalized and sum, both of x's shape and the promoted dtype; the norm is of the rounded sum. With
        `quantize`, (quantized [..., N], scales float32 [..., 1], sum): the norm, not rounded before, is about
        quantized * scales; a scale is the row's largest magnitude over 127 or 448, 1 for a row of zeros and
        NaN for one with a NaN. The quantized form has no gradient: a backward through it raises.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: shapes or devices that do not fit, a negative eps, an unknown `quantize`.

    Example:
        >>> import torch, fastattn
        >>> x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
        >>> normalized, total = fastattn.ops.add_layer_norm(x, residual, torch.ones(8), None, 1e-5)
        >>> torch.equal(total, residual + x)
        True
        >>> rows, scales, _ = fastattn.ops.add_layer_norm(x, residual, None, None, 1e-5, quantize="int8")
        >>> rows.dtype, scales.shape, rows.abs().max().item()
        (torch.int8, torch.Size([2, 3, 1]), 127)
    """
    _check("add_layer_norm", x, residual, weight, bias, eps)
    x, residual = _promoted("add_layer_norm", x, residual, dropout_p)
    seed = draw_seed(dropout_p, x.device)
    if quantize is not None:
        _check_quantize("add_layer_norm", quantize)
        quantized: tuple[Tensor, Tensor, Tensor] = _add_layer_norm_quantized(
            x, residual, weight, bias, eps, dropout_p, seed, quantize
        )
        return quantized
    compute = add_layer_norm_in_pytorch if runs_in_pytorch(x) else _add_layer_norm
    normalized, total = compute(x, residual, weight, bias, eps, dropout_p, seed)
    return normalized, total


@overload
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float,
    dropout_p: float = 0.0, offset: float = 0.0, quantize: None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


@overload
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float,
    dropout_p: float = 0.0, offset: float = 0.0, *, quantize: Quantization,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    eps: float,
    dropout_p: float = 0.0,
    offset: float = 0.0,
    quantize: Quantization | None = None,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]:
    """`rms_norm` of `residual + dropout(x)` over the last dimension, and that sum itself.

    Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019), equation 4.

    Args:
        x: [..., N], float16, bfloat16, float32 or float64.
        residual: the shape of x. Where the dtypes of x and residual differ, both are promoted, as addition
            does.
        weight: [N], floating point of any dtype, or None.
        eps: added to the mean square, at least 0.
        dropout_p: probability of dropping an element of x, in [0, 1].
        offset: added to the weight, in float32: 1.0 for Gemma.
        quantize: "int8" or "fp8", as in `add_layer_norm`.

    Returns:
        (normalized, sum), or (quantized, scales, sum) with `quantize`, as `add_layer_norm`.

    Raises:
        TypeError: an argument that is not floating point.
        ValueError: shapes or devices that do not fit, a negative eps, an offset without a weight, an unknown
            `quantize`.

    Example:
        >>> import torch, fastattn
        >>> x, residual = torch.full((1, 2), 2.0), torch.full((1, 2), 3.0)
        >>> fastattn.ops.add_rms_norm(x, residual, torch.ones(2), 0.0)
        (tensor([[1., 1.]]), tensor([[5., 5.]]))
    """
    _check("add_rms_norm", x, residual, weight, None, eps, offset)
    x, residual = _promoted("add_rms_norm", x, residual, dropout_p)
    seed = draw_seed(dropout_p, x.device)
    if quantize is not None:
        _check_quantize("add_rms_norm", quantize)
        quantized: tuple[Tensor, Tensor, Tensor] = _add_rms_norm_quantized(
            x, residual, weight, eps, offset, dropout_p, seed, quantize
        )
        return quantized
    compute = add_rms_norm_in_pytorch if runs_in_pytorch(x) else _add_rms_norm
    normalized, total = compute(x, residual, weight, eps, offset, dropout_p, seed)
    return normalized, total


def _check(
    op: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float = 0.0,
) -> None:
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., N]; got a scalar")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(
            f"{op}: x and residual must have one shape [..., N]; got {shape_of(x)} and {shape_of(residual)}"
        )
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; accepted are {FLOAT_DTYPES}")
        check_device(op, "x", x, name, tensor)
        if name in ("weight", "bias") and tensor.shape != x.shape[-1:]:
            raise ValueError(f"{op}: {name} must be [{x.shape[-1]}]; got {shape_of(tensor)}")
    if not eps >= 0.0:
        raise ValueError(f"{op}: eps is {eps}; it must be at least 0")
    if offset != 0.0 and weight is None:
        raise ValueError(f"{op}: offset is {offset} without a weight to add it to; give a weight")


def _check_quantize(op: str, quantize: str) -> None:
    if quantize not in QUANTIZED:
        raise ValueError(f"{op}: quantize is {quantize!r}; accepted are None, 'int8' and 'fp8'")


def _promoted(op: str, x: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
    check_dropout(op, dropout_p)
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return x.to(dtype), residual.to(dtype)


def _runs_kernel(x: Tensor) -> bool:
    return backend_for(x.device) == "triton" and x.dtype != torch.float64


def _forward(name: str, in_pytorch: Any) -> Any:
    """The kernel `<name>_forward` where kernels run, else `in_pytorch`."""

    def forward(x: Tensor, *rest: Any) -> Any:
        if _runs_kernel(x):
            from fastattn_kernels import norm as kernels

            return getattr(kernels, f"{name}_forward")(x, *rest)
        results = in_pytorch(x, *rest)
        # As the fakes and kernels promise.
        return tuple(r.contiguous() for r in results) if isinstance(results, tuple) else results.contiguous()

    return forward


def _fake_rows(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_rows_and_sum(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_quantized(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dtype, _ = QUANTIZED[rest[-1]]
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scales, x.new_empty(x.shape)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    pass


def _no_gradient(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError("quantized norms have no gradient; call with quantize=None where one is needed")


_SUM = "Tensor x, Tensor residual, Tensor? weight"
_DROPOUT = "float dropout_p, Tensor? seed"

_layer_norm = register(
    "layer_norm",
    "Tensor x, Tensor? weight, Tensor? bias, float eps",
    "Tensor",
    forward=_forward("layer_norm", layer_norm_in_pytorch),
    fake=_fake_rows,
    reference=layer_norm_reference,
)
_rms_norm = register(
    "rms_norm",
    "Tensor x, Tensor? weight, float eps, float offset",
    "Tensor",
    forward=_forward("rms_norm", rms_norm_in_pytorch),
    fake=_fake_rows,
    reference=rms_norm_reference,
)
_add_layer_norm = register(
    "add_layer_norm",
    f"{_SUM}, Tensor? bias, float eps, {_DROPOUT}",
    "(Tensor, Tensor)",
    forward=_forward("add_layer_norm", add_layer_norm_in_pytorch),
    fake=_fake_rows_and_sum,
    reference=add_layer_norm_reference,
)
_add_rms_norm = register(
    "add_rms_norm",
    f"{_SUM}, float eps, float offset, {_DROPOUT}",
    "(Tensor, Tensor)",
    forward=_forward("add_rms_norm", add_rms_norm_in_pytorch),
    fake=_fake_rows_and_sum,
    reference=add_rms_norm_reference,
)
_add_layer_norm_quantized = register(
    "add_layer_norm_quantized",
    f"{_SUM}, Tensor? bias, float eps, {_DROPOUT}, str quantize",
    "(Tensor, Tensor, Tensor)",
    forward=_forward("add_layer_norm_quantized", add_layer_norm_quantized_reference),
    fake=_fake_quantized,
    setup_context=_save_nothing,
    backward=_no_gradient,
)
_add_rms_norm_quantized = register(
    "add_rms_norm_quantized",
    f"{_SUM}, float eps, float offset, {_DROPOUT}, str quantize",
    "(Tensor, Tensor, Tensor)",
    forward=_forward("add_rms_norm_quantized", add_rms_norm_quantized_reference),
    fake=_fake_quantized,
    setup_context=_save_nothing,
    backward=_no_gradient,
)
