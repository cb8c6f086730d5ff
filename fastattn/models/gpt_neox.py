"""The GPT-NeoX family (Pythia): attention and MLP side by side, each of a norm of its own, or one after the
other.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.gpt_neox import modeling_gpt_neox

from fastattn.layers import ResidualLayer
from fastattn.models.decoder import FusedMLP
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class GPTNeoXMLP(FusedMLP, modeling_gpt_neox.GPTNeoXMLP):
    fastattn_original = modeling_gpt_neox.GPTNeoXMLP
    expand_name = "dense_h_to_4h"
    contract_name = "dense_4h_to_h"


class GPTNeoXLayer(ResidualLayer, modeling_gpt_neox.GPTNeoXLayer):
    fastattn_original = modeling_gpt_neox.GPTNeoXLayer
    entry_norm_name: ClassVar[str] = "input_layernorm"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        layer_past: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        stream = self.residual_stream(hidden_states)
        attended, _ = self.attention(
            stream.norm(self.input_layernorm),
            attention_mask=attention_mask,
            position_ids=position_ids,
            layer_past=layer_past,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        attended = self.post_attention_dropout(attended)
        if not self.use_parallel_residual:
            stream.add(attended)
        expanded = self.post_mlp_dropout(self.mlp(stream.norm(self.post_attention_layernorm)))
        stream.add(expanded + attended if self.use_parallel_residual else expanded)
        return stream.leave()


FAMILY = Family(
    name="gpt_neox",
    attention="partial rotary positions",
    sites=(
        Site("activation", GPTNeoXMLP),
        Site("residual_norm", GPTNeoXLayer),
    ),
)
