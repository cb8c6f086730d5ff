"""The GPT-Neo family: scores without a scale, every other layer under a window. Its attention does not ask
transformers' attention interface.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from transformers.models.gpt_neo import modeling_gpt_neo

from fastattn import ops
from fastattn.layers import FusedLayer, ResidualLayer, project
from fastattn.models.decoder import FusedMLP
from fastattn.models.family import Family, Site
from fastattn.models.interface import attention_forward

__all__ = ["FAMILY"]


class GPTNeoSelfAttention(FusedLayer, modeling_gpt_neo.GPTNeoSelfAttention):
    fastattn_original = modeling_gpt_neo.GPTNeoSelfAttention
    projection_names = ("q_proj", "k_proj", "v_proj")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        local = self.attention_type == "local"
        if output_attentions or (local and getattr(layer_past, "is_compileable", False)):
            original: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
            return original
        shape = (*hidden_states.shape[:2], self.num_heads, self.head_dim)
        query, key, value = (
            x.view(shape).transpose(1, 2)
            for x in project(hidden_states, [getattr(self, name) for name in self.projection_names])
        )
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_id)
        dropout_p = self.attn_dropout.p if self.training else 0.0
        window = (self.config.window_size - 1, 0) if local else None
        if query.shape[2] == 1 and (window is None or key.shape[2] <= window[0] + 1):
            attended, _ = attention_forward(
                self, query, key, value, attention_mask, dropout_p, scaling=1.0, output_attentions=False
            )
            attended = attended.flatten(2)
        else:
            # Whatever the mask says, the layer hides what comes later or lies before its window, counted from
            # the last key.
            out = ops.attention(
                query,
                key,
                value,
                bias=attention_mask,
                causal=True,
                window=window,
                scale=1.0,
                dropout_p=dropout_p,
            )
            assert isinstance(out, Tensor)
            attended = out.transpose(1, 2).flatten(2)
        return self.resid_dropout(project(attended, [self.out_proj])[0]), None


class GPTNeoMLP(FusedMLP, modeling_gpt_neo.GPTNeoMLP):
    fastattn_original = modeling_gpt_neo.GPTNeoMLP
    expand_name = "c_fc"
    contract_name = "c_proj"
    dropout_name = "dropout"


class GPTNeoBlock(ResidualLayer, modeling_gpt_neo.GPTNeoBlock):
    fastattn_original = modeling_gpt_neo.GPTNeoBlock
    entry_norm_name: ClassVar[str] = "ln_1"

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        stream = self.residual_stream(hidden_states)
        attended, weights = self.attn(
            stream.norm(self.ln_1),
            layer_past=layer_past,
            attention_mask=attention_mask,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        stream.add(attended)
        stream.add(self.mlp(stream.norm(self.ln_2)))
        return stream.leave(), weights


FAMILY = Family(
    name="gpt_neo",
    attention="absolute positions, scores without a scale, a window in some layers",
    sites=(
        Site("attention", GPTNeoSelfAttention),
        Site("activation", GPTNeoMLP),
        Site("residual_norm", GPTNeoBlock),
    ),
    limits=(
        "with a static cache a local layer runs the original's forward, which counts its window from the end "
        "of the cache, not of the sequence",
    ),
)
