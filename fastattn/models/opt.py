"""The OPT family (and Galactica): norms before attention and MLP, or after them (OPT-350m)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.models.opt import modeling_opt

from fastattn.layers import ResidualLayer, activated_linear, project
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class OPTDecoderLayer(ResidualLayer, modeling_opt.OPTDecoderLayer):
    fastattn_original = modeling_opt.OPTDecoderLayer

    @property
    def entry_norm(self) -> nn.Module | None:
        return self.self_attn_layer_norm if self.do_layer_norm_before else None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        before = self.do_layer_norm_before
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=stream.norm(self.self_attn_layer_norm) if before else stream.value,
            past_key_values=past_key_values,
            position_ids=position_ids,
            attention_mask=attention_mask,
            **kwargs,
        )
        stream.add(attended, self.dropout)
        normalized = (
            stream.norm(self.final_layer_norm) if before else stream.normalize(self.self_attn_layer_norm)
        )
        expanded = activated_linear(normalized, self.fc1, self.activation_fn)
        stream.add(project(expanded, [self.fc2])[0], self.dropout)
        if not before:
            stream.normalize(self.final_layer_norm)
        return stream.leave()


FAMILY = Family(
    name="opt",
    attention="absolute positions",
    sites=(Site("residual_norm", OPTDecoderLayer),),
)
