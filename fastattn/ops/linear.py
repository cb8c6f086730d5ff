"""Several linear layers of one input, as one matrix product where their weights lie side by side in
memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, autocast, check_device, shape_of

__all__ = ["packed_linear"]


def packed_linear(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """`torch.nn.functional.linear` of one input with several weights, the query, key and value projections
    say.

    Where the weights (and biases) are adjacent views of one buffer they are read as one matrix and multiplied
    once; elsewhere each is multiplied on its own. Either way every weight gets its own gradient.

    Args:
        x: [..., K], floating point.
        weights: each [N_i, K].
        biases: one a weight, each [N_i] or None.

    Returns:
        one tensor [..., N_i] a weight.

    Raises:
        TypeError: dtypes that are not floating point or differ outside autocast.
        ValueError: no weights, or counts, shapes or devices that do not fit.

    Example:
        >>> import torch, fastattn
        >>> weights = [torch.eye(3), torch.ones(2, 3)]
        >>> query, key = fastattn.ops.packed_linear(torch.ones(1, 3), weights, [None, None])
        >>> query
        tensor([[1., 1., 1.]])
    """
    if not weights or len(weights) != len(biases):
        raise ValueError(
            f"packed_linear: needs at least one weight and one bias (or None) a weight; "
            f"got {len(weights)} weights and {len(biases)} biases"
        )
    if torch.is_autocast_enabled(x.device.type):
        (x,), weights = autocast(x), list(autocast(*weights))
        biases = [bias if bias is None else autocast(bias)[0] for bias in biases]
    for index, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"packed_linear: weights[{index}] must be [N, {x.shape[-1]}] for x {shape_of(x)}; "
                f"got {shape_of(weight)}"
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"packed_linear: biases[{index}] must be [{weight.shape[0]}]; got {shape_of(bias)}"
            )
        for name, tensor in ((f"weights[{index}]", weight), (f"biases[{index}]", bias)):
            if tensor is None:
                continue
            check_device("packed_linear", "x", x, name, tensor)
            if tensor.dtype != x.dtype or x.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"packed_linear: {name} is {tensor.dtype} and x {x.dtype}; "
                    "they must be one floating dtype"
                )
    if all(bias is None for bias in biases):
        present = []
    else:
        # Autograd reaches tensors in a list only where every entry is one: a missing bias among others
        # becomes zeros.
        present = [
            x.new_zeros(weight.shape[0]) if bias is None else bias
            for weight, bias in zip(weights, biases, strict=True)
        ]
    if runs_in_pytorch(x) and not _one_matrix(weights, present):
        return packed_linear_reference(x, list(weights), present)
    outputs: list[Tensor] = _packed_linear(x, list(weights), present)
    return outputs


def packed_linear_reference(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """`fastattn::packed_linear` in plain PyTorch; `biases` is empty or has one tensor a weight."""
    if not biases:
        return [linear(x, weight) for weight in weights]
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def _adjacent(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors are contiguous and follow one another in one storage."""
    first = tensors[0]
    offset = first.storage_offset()
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or tensor.storage_offset() != offset
        ):
            return False
        offset += tensor.numel()
    return True


def _one_matrix(weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    """Whether one product reads all weights, and one vector all biases."""
    return len(weights) > 1 and _adjacent(weights) and (not biases or _adjacent(biases))


def _forward(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    if not _one_matrix(weights, biases):
        return packed_linear_reference(x, weights, biases)
    rows = [weight.shape[0] for weight in weights]
    weight = weights[0].as_strided((sum(rows), x.shape[-1]), (x.shape[-1], 1))
    bias = biases[0].as_strided((sum(rows),), (1,)) if biases else None
    return [part.contiguous() for part in linear(x, weight, bias).split(rows, dim=-1)]


def _fake(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, biases = inputs
    ctx.save_for_backward(x, *weights)
    ctx.has_biases = bool(biases)


def _backward(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """Y_i = X W_i^T + b_i, so dX = sum of dY_i W_i, dW_i = dY_i^T X, db_i = sum of dY_i over the rows."""
    x, *weights = ctx.saved_tensors
    needs_x, needs_weights, needs_biases = ctx.needs_input_grad
    rows = x.reshape(-1, x.shape[-1])
    flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
    grad_x = None
    if needs_x:
        for grad, weight in zip(flat, weights, strict=True):
            grad_x = grad @ weight if grad_x is None else grad_x + grad @ weight
        assert grad_x is not None
        grad_x = grad_x.reshape(x.shape)
    grad_weights = [grad.T @ rows if need else None for grad, need in zip(flat, needs_weights, strict=True)]
    grad_biases = [
        grad.sum(0) if need else None
        for grad, need in zip(flat, needs_biases if ctx.has_biases else (), strict=ctx.has_biases)
    ]
    return grad_x, grad_weights, grad_biases


_packed_linear = register(
    "packed_linear",
    "Tensor x, Tensor[] weights, Tensor[] biases",
    "Tensor[]",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
