"""The one way an operation is registered with PyTorch: schema, implementation, fake and autograd.

An operation without a backward kernel of its own recomputes its output through the reference and
differentiates that;
dropout is drawn from the seed tensor among the arguments, so the recomputed mask is the forward's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastattn.backend import backend_for, get_backend
from fastattn.ops.validation import is_traced

__all__ = ["draw_seed", "register", "runs_in_pytorch"]

_LIBRARY = torch.library.Library("fastattn", "DEF")


def register(
    name: str,
    arguments: str,
    returns: str,
    *,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    reference: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Register `fastattn::<name>` and return the callable operation.

    Args:
        name: the operation's name.
        arguments: the schema's arguments; where `reference` is used, tensors stand alone, not in lists.
        returns: the schema's returns.
        forward: the implementation, called below autograd.
        fake: shapes and strides of `forward`'s results.
        reference: differentiable function of the same arguments and results, which the backward recomputes.
        setup_context, backward: an explicit derivative, in place of `reference`.
    """
    qualified_name = f"fastattn::{name}"
    _LIBRARY.define(f"{name}({arguments}) -> {returns}")
    _LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified_name, fake, lib=_LIBRARY)
    if reference is not None:
        setup_context, backward = _save_arguments, _define_recomputation(name, arguments, reference)
    assert setup_context is not None and backward is not None
    torch.library.register_autograd(qualified_name, backward, setup_context=setup_context, lib=_LIBRARY)
    operation: Callable[..., Any] = getattr(torch.ops.fastattn, name).default
    return operation


def _save_arguments(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in inputs))
    ctx.constants = tuple(None if isinstance(value, Tensor) else value for value in inputs)


def _define_recomputation(name: str, arguments: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """Define `<name>_backward`, one opaque node for compile, and return the backward that calls it."""

    def differentiate(grads: list[Tensor | None], *values: Any) -> list[Tensor]:
        *arguments_, needs = values
        with torch.enable_grad():
            leaves = [
                value.detach().requires_grad_(need) if isinstance(value, Tensor) else value
                for value, need in zip(arguments_, needs, strict=True)
            ]
            outputs = reference(*leaves)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [
            (output, grad)
            for output, grad in zip(outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        ]
        wanted = [leaf for leaf, need in zip(leaves, needs, strict=True) if need]
        found = torch.autograd.grad(
            [output for output, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True
        )
        return [
            torch.zeros_like(leaf, memory_format=torch.contiguous_format)
            if grad is None
            else grad.contiguous()
            for leaf, grad in zip(wanted, found, strict=True)
        ]

    def fake(grads: list[Tensor | None], *values: Any) -> list[Tensor]:
        *arguments_, needs = values
        return [
            torch.empty_like(value, memory_format=torch.contiguous_format)
            for value, need in zip(arguments_, needs, strict=True)
            if need
        ]

    backward_name = f"{name}_backward"
    _LIBRARY.define(f"{backward_name}(Tensor?[] grads, {arguments}, bool[] needs) -> Tensor[]")
    _LIBRARY.impl(backward_name, differentiate, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastattn::{backward_name}", fake, lib=_LIBRARY)
    operation = getattr(torch.ops.fastattn, backward_name).default

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values = [
            saved if constant is None else constant
            for saved, constant in zip(ctx.saved_tensors, ctx.constants, strict=True)
        ]
        needs = list(ctx.needs_input_grad)
        # One opaque node for whoever traces. Outside a trace the function itself: below a dispatch mode, a
        # FLOP counter say, an operator's implementation runs where autograd records nothing.
        traced = any(grad is not None and type(grad) is not Tensor for grad in grads)
        found = iter((operation if traced else differentiate)(list(grads), *values, needs))
        return tuple(next(found) if need else None for need in needs)

    return backward


def runs_in_pytorch(x: Tensor) -> bool:
    """Whether an operation on `x` is PyTorch's own functions, called one after another and differentiated by
    PyTorch.

    The registered operator is for graphs (compile, export), which see one node, and for kernels. Elsewhere it
    would only cost: dispatching to Python twice is 10 to 40 microseconds a call.
    """
    if is_traced(x):
        return False
    # The common case first: every layer asks several times a token.
    return (x.is_cpu and get_backend() == "auto") or backend_for(x.device) == "torch"


def draw_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """A fresh dropout seed, int64 [1] on `device`, from PyTorch's generator; None when nothing is dropped.

    A tensor, so that checkpointing (which replays the generator) and graph capture see it as data.
    """
    if dropout_p == 0.0:
        return None
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
