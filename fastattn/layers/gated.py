"""Gated MLPs: the activation and the product with the other half in one operation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastattn import ops
from fastattn.layers.fused import FusedLayer, project
from fastattn.layers.plain import is_observed
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["FusedGatedMLP", "gate_kind", "gated"]

# Activation class -> the `kind` of `ops.gated_activation` that computes it.
_KINDS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.FastGELUActivation": "gelu_tanh",
}


def gate_kind(activation: Any) -> str | None:
    """The `kind` of `ops.gated_activation` that computes `activation`; None where none does."""
    kind = type(activation)
    return _KINDS.get(f"{kind.__module__}.{kind.__qualname__}")


def gated(gate: Tensor, up: Tensor, activation: nn.Module) -> Tensor:
    """`activation(gate) * up`, in one operation where the activation is known and unobserved."""
    kind = gate_kind(activation)
    if kind is None or is_observed(activation) or gate.dtype != up.dtype:
        result: Tensor = activation(gate) * up
        return result
    return ops.gated_activation(gate, up, kind)


class FusedGatedMLP(FusedLayer):
    """down(activation(gate(x)) * up(x))."""

    gate_name: ClassVar[str] = "gate_proj"
    up_name: ClassVar[str] = "up_proj"
    down_name: ClassVar[str] = "down_proj"
    activation_name: ClassVar[str] = "act_fn"

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        activation = getattr(module, cls.activation_name)
        if gate_kind(activation) is None:
            return f"its activation is {getattr(activation, '__name__', type(activation).__name__)}"
        return None

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != torch.bfloat16 and runs_in_pytorch(x):
            # The original is the same calls, without the questions; for bfloat16 `project` has faster ones.
            called: Tensor = super().forward(x)
            return called
        modules = self._modules
        gate, up = project(x, [modules[self.gate_name], modules[self.up_name]])  # type: ignore[list-item]
        product = gated(gate, up, getattr(self, self.activation_name))
        return project(product, [modules[self.down_name]])[0]  # type: ignore[list-item]
