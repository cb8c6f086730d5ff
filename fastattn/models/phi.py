"""The Phi family: attention and MLP of one norm side by side, rotary positions on part of each head."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.phi import modeling_phi

from fastattn.layers import ResidualLayer
from fastattn.models.decoder import FusedMLP
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class PhiMLP(FusedMLP, modeling_phi.PhiMLP):
    fastattn_original = modeling_phi.PhiMLP
    expand_name = "fc1"
    contract_name = "fc2"
    activation_name = "activation_fn"


class PhiDecoderLayer(ResidualLayer, modeling_phi.PhiDecoderLayer):
    fastattn_original = modeling_phi.PhiDecoderLayer
    entry_norm_name: ClassVar[str] = "input_layernorm"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        stream = self.residual_stream(hidden_states)
        normalized = stream.norm(self.input_layernorm)
        attended, _ = self.self_attn(
            hidden_states=normalized,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        stream.add(self.resid_dropout(attended) + self.resid_dropout(self.mlp(normalized)))
        return stream.leave()


FAMILY = Family(
    name="phi",
    attention="partial rotary positions, grouped queries",
    sites=(
        Site("activation", PhiMLP),
        Site("residual_norm", PhiDecoderLayer),
    ),
)
