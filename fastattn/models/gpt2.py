"""The GPT-2 family, with cross-attention where a model has it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.gpt2 import modeling_gpt2

from fastattn.layers import ResidualLayer
from fastattn.models.decoder import FusedMLP
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class GPT2MLP(FusedMLP, modeling_gpt2.GPT2MLP):
    fastattn_original = modeling_gpt2.GPT2MLP
    expand_name = "c_fc"
    contract_name = "c_proj"
    dropout_name = "dropout"


class GPT2Block(ResidualLayer, modeling_gpt2.GPT2Block):
    fastattn_original = modeling_gpt2.GPT2Block
    entry_norm_name: ClassVar[str] = "ln_1"

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> Tensor:
        if self.gains_nothing(hidden_states):
            original: Tensor = super().forward(
                hidden_states,
                past_key_values,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                use_cache,
                **kwargs,
            )
            return original
        stream = self.residual_stream(hidden_states)
        attended, _ = self.attn(
            stream.norm(self.ln_1),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            use_cache=use_cache,
            **kwargs,
        )
        stream.add(attended)
        if encoder_hidden_states is not None:
            if not hasattr(self, "crossattention"):
                raise ValueError(
                    "encoder_hidden_states are given and the model has no cross-attention: build it with "
                    "config.add_cross_attention=True"
                )
            attended, _ = self.crossattention(
                stream.norm(self.ln_cross_attn),
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
            )
            stream.add(attended)
        stream.add(self.mlp(stream.norm(self.ln_2)))
        return stream.leave()


FAMILY = Family(
    name="gpt2",
    attention="absolute positions; cross-attention where the model has it",
    sites=(
        Site("activation", GPT2MLP),
        Site("residual_norm", GPT2Block),
    ),
)
