"""The GPT-J family: attention and MLP of one norm side by side, rotary positions of neighbouring pairs on
part of each head. Its attention does not ask transformers' attention interface.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers.models.gptj import modeling_gptj

from fastattn import ops
from fastattn.layers import FusedLayer, ResidualLayer, project
from fastattn.models.decoder import FusedMLP
from fastattn.models.family import Family, Site
from fastattn.models.interface import attention_forward

__all__ = ["FAMILY"]


class GPTJAttention(FusedLayer, modeling_gptj.GPTJAttention):
    fastattn_original = modeling_gptj.GPTJAttention
    projection_names = ("q_proj", "k_proj", "v_proj")

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        if module.rotary_dim is None:
            return "its rotary_dim is None: positions are as wide as the model, not as a head"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if output_attentions:
            weighted: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, layer_past, attention_mask, position_ids, use_cache, True, **kwargs
            )
            return weighted
        assert position_ids is not None
        shape = (*hidden_states.shape[:2], self.num_attention_heads, self.head_dim)
        query, key, value = (
            x.view(shape).transpose(1, 2)
            for x in project(hidden_states, [getattr(self, name) for name in self.projection_names])
        )
        positions = self.embed_positions.to(position_ids.device)[position_ids]
        # Each angle twice: once for either element of its pair.
        sin, cos = positions.repeat_interleave(2, dim=-1).chunk(2, dim=-1)
        query, key = ops.rotary(query, key, cos, sin, interleaved=True)
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        attended, _ = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attn_dropout.p if self.training else 0.0,
            scaling=1.0 / self.scale_attn,
            # What hides a key is the mask alone.
            is_causal=False,
            output_attentions=False,
        )
        return self.resid_dropout(project(attended.flatten(2), [self.out_proj])[0]), None


class GPTJMLP(FusedMLP, modeling_gptj.GPTJMLP):
    fastattn_original = modeling_gptj.GPTJMLP
    expand_name = "fc_in"
    contract_name = "fc_out"
    dropout_name = "dropout"


class GPTJBlock(ResidualLayer, modeling_gptj.GPTJBlock):
    fastattn_original = modeling_gptj.GPTJBlock
    entry_norm_name: ClassVar[str] = "ln_1"

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        stream = self.residual_stream(hidden_states)
        normalized = stream.norm(self.ln_1)
        attended, weights = self.attn(
            hidden_states=normalized,
            layer_past=layer_past,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        stream.add(attended + self.mlp(normalized))
        return stream.leave(), weights


FAMILY = Family(
    name="gptj",
    attention="partial rotary positions of neighbouring pairs",
    sites=(
        Site("attention", GPTJAttention),
        Site("activation", GPTJMLP),
        Site("residual_norm", GPTJBlock),
    ),
)
