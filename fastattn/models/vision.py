"""The layer that ViT and CLIP share the shape of, written with a residual stream, and its MLP."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastattn.layers import FusedLayer, ResidualLayer, activated_linear, cannot_fuse_activation, project

__all__ = ["FusedMLP", "PreNormLayer"]


class PreNormLayer(ResidualLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)), under the names the architecture has for its parts."""

    attention_name: ClassVar[str]
    second_norm_name: ClassVar[str]

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        modules = self._modules
        stream = self.residual_stream(hidden_states)
        normalized = stream.norm(modules[self.entry_norm_name])  # type: ignore[index,arg-type]
        attended, _ = modules[self.attention_name](normalized, attention_mask=attention_mask, **kwargs)  # type: ignore[misc]
        dropout = modules.get("dropout")
        stream.add(attended if dropout is None else dropout(attended))
        normalized = stream.norm(modules[self.second_norm_name])  # type: ignore[arg-type]
        expanded = modules["mlp"](normalized)  # type: ignore[misc]
        stream.add(expanded if dropout is None else dropout(expanded))
        return stream.leave()


class FusedMLP(FusedLayer):
    """fc2(gelu(fc1(x))), the first bias and the activation in one fused operation."""

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return cannot_fuse_activation(module.activation_fn, module.fc1)  # type: ignore[arg-type]

    def forward(self, hidden_states: Tensor) -> Tensor:
        modules = self._modules
        expanded = activated_linear(hidden_states, modules["fc1"], self.activation_fn)  # type: ignore[arg-type]
        return project(expanded, [modules["fc2"]])[0]  # type: ignore[list-item]
