"""ALBERT: one layer, or a few, applied again and again; attention ends with its own residual and norm."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.albert import modeling_albert

from fastattn.layers import FusedLayer, activated_linear, add_norm, dense_add_norm, project
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion
from fastattn.models.self_attention import FusedSelfAttention

__all__ = ["FAMILY"]


class AlbertAttention(FusedSelfAttention, modeling_albert.AlbertAttention):
    fastattn_original = modeling_albert.AlbertAttention
    dropout_name = "attention_dropout"

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = super().forward(hidden_states, attention_mask, **kwargs)
        normalized = dense_add_norm(attended, self.dense, self.output_dropout, self.LayerNorm, hidden_states)
        return normalized, weights


class AlbertLayer(FusedLayer, modeling_albert.AlbertLayer):
    fastattn_original = modeling_albert.AlbertLayer

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if self.chunk_size_feed_forward:
            chunked: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return chunked
        attended, _ = self.attention(hidden_states, attention_mask, **kwargs)
        return add_norm(self.full_layer_layer_norm, self.ff_chunk(attended), attended)[0]

    def ff_chunk(self, attention_output: Tensor) -> Tensor:
        x = activated_linear(attention_output, self.ffn, self.activation)
        return project(x, [self.ffn_output])[0]


class AlbertTransformer(PackedRegion, modeling_albert.AlbertTransformer):
    fastattn_original = modeling_albert.AlbertTransformer


FAMILY = Family(
    name="albert",
    attention="absolute positions",
    sites=(
        Site("attention", AlbertAttention),
        Site("residual_norm", AlbertLayer),
        Site("encoder", AlbertTransformer),
    ),
)
