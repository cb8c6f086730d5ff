"""What one layer computes ahead for the layer after it, handed over only if nothing came between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Border", "is_differentiable", "may_hand_over"]


class Border:
    """Stands between two layers that follow each other; the first puts, the second takes.

    What is put belongs to one tensor, the first layer's output, and is taken only with that very tensor: a
    hook that returns another one, a layer left out or another order of layers each end in the second layer
    computing it itself. Taken once, so that no copy, pickle or graph of the model ever holds a tensor of an
    earlier call; never copied or pickled with the model.
    """

    def __init__(self) -> None:
        self._held: tuple[Tensor, int | None, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_held": None}

    def put(self, output: Tensor, value: Any) -> None:
        self._held = (output, _version(output), value)

    def take(self, hidden_states: Tensor) -> Any:
        """The value put with `hidden_states`; None if there is none, or it was edited in place since."""
        # One assignment: with several threads in one model each gets its own or, after a race, nothing.
        held, self._held = self._held, None
        if held is None or held[0] is not hidden_states or held[1] != _version(hidden_states):
            return None
        return held[2]

    def take_norm(self, norm: nn.Module | None, hidden_states: Tensor) -> Tensor | None:
        """`norm(hidden_states)`, where the first layer put `(norm, norm(output))`."""
        taken = self.take(hidden_states)
        if taken is None or taken[0] is not norm or not is_differentiable(taken[1], hidden_states):
            return None
        normalized: Tensor = taken[1]
        return normalized


def is_differentiable(ahead: Tensor, hidden_states: Tensor) -> bool:
    """Whether gradients flow through `ahead` as through the tensor it was put with: reentrant checkpointing
    computes layers without a graph, and what such a layer computed ahead would end gradients.
    """
    return not torch.is_grad_enabled() or ahead.requires_grad or not hidden_states.requires_grad


def _version(x: Tensor) -> int | None:
    """Counts edits in place; None where PyTorch does not count them."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    return x._version


def may_hand_over(layer: nn.Module) -> bool:
    """Whether `layer` may put something now.

    Not under checkpointing, whose second forward would find another border than its first; and not past hooks
    where their edits in place would go unseen.
    """
    if getattr(layer, "gradient_checkpointing", False) and layer.training:
        return False
    if torch.compiler.is_compiling():
        return True
    if torch.is_inference_mode_enabled():
        return not layer._forward_hooks
    return not torch.is_grad_enabled() or not _tensors_are_intercepted()


def _tensors_are_intercepted() -> bool:
    """Whether the tensors autograd saves are replaced: non-reentrant checkpointing, in both forwards."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return hooks is None or hooks(True) is not None
