"""Forwards that run a layer's work as fused operations, mixed into the classes that adapters swap in.

Each names, as class attributes, the submodules it reads, and falls back to the layer's own forward where one
of them is not plain (LoRA, hooks, quantized): right first.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from fastattn import ops
from fastattn.layers.onednn import onednn_linear
from fastattn.layers.plain import is_plain
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["FusedActivation", "FusedLayer", "FusedResidualNorm", "project"]


def project(x: Tensor, projections: list[nn.Module]) -> list[Tensor]:
    """Every projection of `x`: packed where all are plain `nn.Linear`, each called where one is not.

    Projections of a model lie apart in memory, so that in PyTorch packing would only be three calls again.
    """
    if runs_in_pytorch(x):
        return [_linear(x, projection) for projection in projections]
    if all(is_plain(projection, nn.Linear) for projection in projections):
        return ops.packed_linear(
            x,
            [projection.weight for projection in projections],  # type: ignore[misc]
            [projection.bias for projection in projections],  # type: ignore[misc]
        )
    return [projection(x) for projection in projections]


def _linear(x: Tensor, layer: nn.Module) -> Tensor:
    if x.dtype == torch.bfloat16 and is_plain(layer, nn.Linear):
        result = onednn_linear(x, layer)  # type: ignore[arg-type]
        if result is not None:
            return result
    called: Tensor = layer(x)
    return called


class FusedLayer(nn.Module):
    """Base of every swapped-in class; `fastattn_original` is the class it takes the place of."""

    fastattn_original: ClassVar[type[nn.Module]]

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        """Why this instance cannot be swapped; None where it can."""
        return None


class FusedResidualNorm(FusedLayer):
    """norm(residual + dropout(dense(x))) in one fused operation after the matrix product."""

    dense_name: ClassVar[str] = "dense"
    dropout_name: ClassVar[str] = "dropout"
    norm_name: ClassVar[str] = "LayerNorm"

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        modules = self._modules
        dropout, norm = modules[self.dropout_name], modules[self.norm_name]
        if not (is_plain(dropout, nn.Dropout) and is_plain(norm, nn.LayerNorm)):
            result: Tensor = super().forward(hidden_states, input_tensor)
            return result
        assert isinstance(dropout, nn.Dropout) and isinstance(norm, nn.LayerNorm)
        dense = modules[self.dense_name]
        dropout_p = dropout.p if dropout.training else 0.0
        in_place = dropout_p == 0.0 and is_plain(dense, nn.Linear) and runs_in_pytorch(hidden_states)
        if in_place:
            assert isinstance(dense, nn.Linear)
            total = onednn_linear(hidden_states, dense, residual=input_tensor)
            if total is not None:
                return layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        x = dense(hidden_states)  # type: ignore[misc]
        if in_place and x.dtype == input_tensor.dtype and not (x.requires_grad or input_tensor.requires_grad):
            # In place on the product nobody else has seen: a new tensor of this size is paid for in page
            # faults.
            return layer_norm(x.add_(input_tensor), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
        return ops.add_layer_norm(x, input_tensor, norm.weight, norm.bias, norm.eps, dropout_p)[0]


# Activation class -> the approximation of `ops.bias_gelu` that computes it.
_APPROXIMATIONS = {
    "transformers.activations.GELUActivation": "none",
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.GELUTanh": "tanh",
}


def _approximation_of(kind: type) -> str | None:
    return _APPROXIMATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


class FusedActivation(FusedLayer):
    """gelu(dense(x)), the bias and the activation in one fused operation."""

    dense_name: ClassVar[str] = "dense"
    activation_name: ClassVar[str] = "intermediate_act_fn"

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        activation = getattr(module, cls.activation_name)
        if _approximation_of(type(activation)) is None:
            return (
                f"its activation is {getattr(activation, '__name__', type(activation).__name__)}, not a GELU"
            )
        if getattr(module, cls.dense_name).bias is None:
            return "its linear layer has no bias"
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        dense, activation = self._modules[self.dense_name], getattr(self, self.activation_name)
        approximate = _approximation_of(type(activation))
        if (
            approximate is None
            or not is_plain(dense, nn.Linear)
            or not is_plain(activation, type(activation))
        ):
            result: Tensor = super().forward(hidden_states)
            return result
        assert isinstance(dense, nn.Linear)
        if not runs_in_pytorch(hidden_states):
            return ops.bias_gelu(linear(hidden_states, dense.weight), dense.bias, approximate)
        fused = onednn_linear(hidden_states, dense, gelu=approximate)
        if fused is not None:
            return fused
        expanded = linear(hidden_states, dense.weight, dense.bias)
        if expanded.requires_grad or expanded.dtype != torch.float32:
            return gelu(expanded, approximate=approximate)
        # In place, as above: a twentieth of BERT-base at 1,024 rows in float32; in half precision, nothing.
        result = torch.ops.aten.gelu_.default(expanded, approximate=approximate)
        return result
