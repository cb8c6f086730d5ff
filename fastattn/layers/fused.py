"""Forwards that run a layer's work as fused operations, mixed into the classes that adapters swap in.

Each names, as class attributes, the submodules it reads, and falls back to the layer's own forward where one
of them is not plain (LoRA, hooks, quantized): right first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from fastattn import ops
from fastattn.layers.onednn import onednn_linear
from fastattn.layers.plain import is_observed, is_plain
from fastattn.layers.quantized_linear import QuantizedLinear
from fastattn.ops.registration import runs_in_pytorch

__all__ = [
    "FusedActivation",
    "FusedLayer",
    "FusedResidualNorm",
    "activated_linear",
    "approximation_of",
    "cannot_fuse_activation",
    "dense_add_norm",
    "project",
]


def project(x: Tensor, projections: list[nn.Module]) -> list[Tensor]:
    """Every projection of `x`: packed where all are plain `nn.Linear`, each called where one is not.

    Projections of a model lie apart in memory, so that in PyTorch packing would only be three calls again.
    Quantized ones share the rounding of `x`.
    """
    if len(projections) > 1 and all(is_plain(each, QuantizedLinear) for each in projections):
        return ops.quantized_linears(
            x,
            [each.packed_weight for each in projections],  # type: ignore[misc]
            [each.bias for each in projections],  # type: ignore[misc]
        )
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
    # Of the submodules that `project` multiplies one input by together, where it does.
    projection_names: ClassVar[tuple[str, ...]] = ()

    if TYPE_CHECKING:
        # Submodules and parameters are the original's.
        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        """Why this instance cannot be swapped; None where it can."""
        return None

    @property
    def must_stay(self) -> bool:
        """Whether the original could not run what this layer now holds: quantized or pruned weights that it
        reads itself.
        """
        return False


class FusedResidualNorm(FusedLayer):
    """norm(residual + dropout(dense(x))) in one fused operation after the matrix product."""

    dense_name: ClassVar[str] = "dense"
    dropout_name: ClassVar[str] = "dropout"
    norm_name: ClassVar[str] = "LayerNorm"

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        modules = self._modules
        dense, dropout, norm = (
            modules[name] for name in (self.dense_name, self.dropout_name, self.norm_name)
        )
        return dense_add_norm(hidden_states, dense, dropout, norm, input_tensor)  # type: ignore[arg-type]


def dense_add_norm(
    x: Tensor, dense: nn.Module, dropout: nn.Module, norm: nn.Module, residual: Tensor
) -> Tensor:
    """`norm(residual + dropout(dense(x)))`, one operation after the matrix product where all are plain."""
    if not (is_plain(dropout, nn.Dropout) and is_plain(norm, nn.LayerNorm)):
        result: Tensor = norm(residual + dropout(dense(x)))
        return result
    assert isinstance(dropout, nn.Dropout) and isinstance(norm, nn.LayerNorm)
    dropout_p = dropout.p if dropout.training else 0.0
    # A plain layer's product is new, and nobody else has it.
    plain = is_plain(dense, nn.Linear)
    in_place = dropout_p == 0.0 and (plain or is_plain(dense, QuantizedLinear)) and runs_in_pytorch(x)
    if in_place and plain:
        assert isinstance(dense, nn.Linear)
        total = onednn_linear(x, dense, residual=residual)
        if total is not None:
            return layer_norm(total, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    x = dense(x)
    if in_place and x.dtype == residual.dtype and not (x.requires_grad or residual.requires_grad):
        # In place on the product nobody else has seen: a new tensor of this size is paid for in page faults.
        return layer_norm(x.add_(residual), norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout_p)[0]


# Activation class -> the approximation of `ops.bias_gelu` that computes it, the same formula to float32's
# precision.
_APPROXIMATIONS = {
    "transformers.activations.GELUActivation": "none",
    "transformers.activations.NewGELUActivation": "tanh",
    "transformers.activations.GELUTanh": "tanh",
    "transformers.activations.FastGELUActivation": "tanh",
    "transformers.activations.AccurateGELUActivation": "tanh",
    "transformers.models.bloom.modeling_bloom.BloomGelu": "tanh",
}


def approximation_of(activation: Any) -> str | None:
    """The GELU that `activation`, a module or function, computes: "none", "tanh", or None where it is
    another.
    """
    if activation is gelu:
        return "none"
    kind = type(activation)
    if kind is nn.GELU:
        approximate: str = activation.approximate
        return approximate
    return _APPROXIMATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


def _is_conv1d(dense: Any) -> bool:
    """Whether `dense` is transformers' `Conv1D`, a linear layer with its weight transposed, as plain as
    `is_plain` asks.
    """
    kind = type(dense)
    return (
        kind.__name__ == "Conv1D"
        and kind.__module__ == "transformers.pytorch_utils"
        and is_plain(dense, kind)
    )


# What `ops.quantized_linear` calls the GELUs of `approximation_of`.
_EPILOGUES = {"none": "gelu", "tanh": "gelu_tanh"}


def activated_linear(x: Tensor, dense: nn.Module, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """`activation(dense(x))`; one operation after the product, or one with it, where the activation is a
    GELU.

    Args:
        x: [..., K].
        dense: a linear layer, read where it is a plain `nn.Linear` or transformers' `Conv1D`, else called.
        activation: the activation as the model has it, module or function.
    """
    approximate = approximation_of(activation)
    if approximate is None or (isinstance(activation, nn.Module) and is_observed(activation)):
        return activation(project(x, [dense])[0])
    if is_plain(dense, QuantizedLinear):
        quantized: Tensor = dense(x, _EPILOGUES[approximate])
        return quantized
    if _is_conv1d(dense):
        if not runs_in_pytorch(x):
            return ops.bias_gelu(x @ dense.weight, dense.bias, approximate)  # type: ignore[arg-type,operator]
        return _gelu(dense(x), approximate)
    if not is_plain(dense, nn.Linear) or dense.bias is None:
        return activation(project(x, [dense])[0])
    assert isinstance(dense, nn.Linear)
    if not runs_in_pytorch(x):
        return ops.bias_gelu(linear(x, dense.weight), dense.bias, approximate)
    fused = onednn_linear(x, dense, gelu=approximate)
    return _gelu(linear(x, dense.weight, dense.bias), approximate) if fused is None else fused


def _gelu(expanded: Tensor, approximate: str) -> Tensor:
    if expanded.requires_grad or expanded.dtype != torch.float32 or not runs_in_pytorch(expanded):
        return gelu(expanded, approximate=approximate)
    # In place on the product nobody else has seen, as above: a twentieth of BERT-base at 1,024 rows in
    # float32; in half precision, nothing.
    result: Tensor = torch.ops.aten.gelu_.default(expanded, approximate=approximate)
    return result


class FusedActivation(FusedLayer):
    """gelu(dense(x)), the bias and the activation in one fused operation."""

    dense_name: ClassVar[str] = "dense"
    activation_name: ClassVar[str] = "intermediate_act_fn"

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return cannot_fuse_activation(getattr(module, cls.activation_name), getattr(module, cls.dense_name))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return activated_linear(
            hidden_states, getattr(self, self.dense_name), getattr(self, self.activation_name)
        )


def cannot_fuse_activation(activation: Any, dense: nn.Module) -> str | None:
    """Why `activated_linear` would only call both; None where it fuses them."""
    if approximation_of(activation) is None:
        return f"its activation is {getattr(activation, '__name__', type(activation).__name__)}, not a GELU"
    if dense.bias is None:
        return "its linear layer has no bias"
    return None
