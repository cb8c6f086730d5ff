"""DistilBERT: BERT's layers, the projection after attention inside it and the norms outside."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.distilbert import modeling_distilbert

from fastattn.layers import FusedLayer, activated_linear, add_norm, cannot_fuse_activation, project
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion
from fastattn.models.self_attention import FusedSelfAttention

__all__ = ["FAMILY"]


class DistilBertSelfAttention(FusedSelfAttention, modeling_distilbert.DistilBertSelfAttention):
    fastattn_original = modeling_distilbert.DistilBertSelfAttention
    projection_names = ("q_lin", "k_lin", "v_lin")

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        attended, weights = super().forward(hidden_states, attention_mask, **kwargs)
        return project(attended, [self.out_lin])[0], weights


class FFN(FusedLayer, modeling_distilbert.FFN):
    fastattn_original = modeling_distilbert.FFN

    @classmethod
    def cannot_replace(cls, module: Any) -> str | None:
        return cannot_fuse_activation(module.activation, module.lin1)

    def forward(self, input: Tensor) -> Tensor:
        if self.chunk_size_feed_forward:
            chunked: Tensor = super().forward(input)
            return chunked
        return self.ff_chunk(input)

    def ff_chunk(self, input: Tensor) -> Tensor:
        x = activated_linear(input, self.lin1, self.activation)
        result: Tensor = self.dropout(project(x, [self.lin2])[0])
        return result


class TransformerBlock(FusedLayer, modeling_distilbert.TransformerBlock):
    fastattn_original = modeling_distilbert.TransformerBlock

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended, _ = self.attention(hidden_states, attention_mask=attention_mask, **kwargs)
        x, _ = add_norm(self.sa_layer_norm, attended, hidden_states)
        return add_norm(self.output_layer_norm, self.ffn(x), x)[0]


class Transformer(PackedRegion, modeling_distilbert.Transformer):
    fastattn_original = modeling_distilbert.Transformer


FAMILY = Family(
    name="distilbert",
    attention="absolute positions",
    sites=(
        Site("attention", DistilBertSelfAttention),
        Site("activation", FFN),
        Site("residual_norm", TransformerBlock),
        Site("encoder", Transformer),
    ),
)
