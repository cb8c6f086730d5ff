"""The Falcon family: rotary positions or ALiBi, one key head, a few or one a query head, attention and MLP
side by side or one after the other. Its attention does not ask transformers' attention interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.models.falcon import modeling_falcon

from fastattn import ops
from fastattn.layers import FusedLayer, QuantizedLinear, ResidualLayer, activated_linear
from fastattn.layers.fused import approximation_of
from fastattn.layers.plain import is_observed, is_plain
from fastattn.models.family import Family, Site
from fastattn.models.interface import attention_forward
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["FAMILY"]


class FalconAttention(FusedLayer, modeling_falcon.FalconAttention):
    fastattn_original = modeling_falcon.FalconAttention

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        # The model adds ALiBi to its mask. The original leaves it at that where it calls SDPA, and adds it
        # once more where it computes the weights itself: so does this.
        fused = self.config._attn_implementation == "sdpa"
        if output_attentions:
            if fused:
                # The original computes them by its other formula, which was written for the other mask.
                alibi = None if alibi is None else torch.zeros_like(alibi)
                attention_mask = _additive(attention_mask, hidden_states.dtype)
            weighted: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states,
                alibi,
                attention_mask,
                position_ids,
                layer_past,
                use_cache,
                True,
                position_embeddings,
                **kwargs,
            )
            return weighted
        query, key, value = self._heads(self.query_key_value(hidden_states))
        if alibi is None:
            assert position_embeddings is not None
            # For the one token of a decoding step the original's is quicker where there is no kernel.
            rotate = modeling_falcon.apply_rotary_pos_emb if runs_in_pytorch(query) else ops.rotary
            query, key = rotate(query, key, *position_embeddings)
        if layer_past is not None:
            if self.new_decoder_architecture:
                # Caches hold every query head's keys, as the original's do.
                group = self.num_heads // self.num_kv_heads
                key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
            key, value = layer_past.update(key, value, self.layer_idx)
        bias = None
        if alibi is not None and not fused:
            bias = alibi.view(query.shape[0], self.num_heads, 1, -1) * self.inv_norm_factor
        attended, _ = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            # The original drops weights under ALiBi alone.
            dropout=self.attention_dropout.p if self.training and alibi is not None else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=bias,
            # Without a mask, as SDPA counts.
            query_start=0 if attention_mask is None and query.shape[2] > 1 else None,
            output_attentions=False,
        )
        return self.dense(attended.flatten(2)), None

    def _heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query [B, Hq, S, D], key and value [B, Hkv, S, D], of the joint projection."""
        groups = self.num_heads // self.num_kv_heads if self.new_decoder_architecture else 1
        if self.new_decoder_architecture:
            shape = (*projected.shape[:2], self.num_kv_heads, groups + 2, self.head_dim)
            heads = projected.view(shape)
            query, key, value = heads[..., :-2, :].flatten(2, 3), heads[..., -2, :], heads[..., -1, :]
        else:
            query, key, value = self._split_heads(projected)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


class FalconMLP(FusedLayer, modeling_falcon.FalconMLP):
    fastattn_original = modeling_falcon.FalconMLP

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        if approximation_of(module.act) is None:
            return f"its activation is {type(module.act).__name__}, not a GELU"
        if getattr(module.dense_h_to_4h, "bias", None) is None:
            return "its linear layer has no bias"
        return None

    def forward(self, x: Tensor) -> Tensor:
        expand, approximate = self.dense_h_to_4h, approximation_of(self.act)
        if isinstance(expand, QuantizedLinear):
            return self.dense_4h_to_h(activated_linear(x, expand, self.act))
        if approximate is None or is_observed(self.act) or not is_plain(expand, modeling_falcon.FalconLinear):
            return self.dense_4h_to_h(self.act(expand(x)))
        if runs_in_pytorch(x):
            expanded = self.act(linear(x, expand.weight, expand.bias))
        else:
            expanded = ops.bias_gelu(linear(x, expand.weight), expand.bias, approximate)
        return self.dense_4h_to_h(expanded)


class FalconDecoderLayer(ResidualLayer, modeling_falcon.FalconDecoderLayer):
    fastattn_original = modeling_falcon.FalconDecoderLayer

    @property
    def two_norms(self) -> bool:
        """Whether attention and MLP each have a norm of their own, of the same sum."""
        return bool(self.config.new_decoder_architecture and self.config.num_ln_in_parallel_attn == 2)

    @property
    def entry_norm(self) -> nn.Module:
        return self.ln_attn if self.two_norms else self.input_layernorm

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        parallel = config.new_decoder_architecture or config.parallel_attn
        stream = self.residual_stream(hidden_states)
        normalized = stream.norm(self.entry_norm)
        attended, weights = self.self_attention(
            normalized,
            layer_past=layer_past,
            attention_mask=attention_mask,
            position_ids=position_ids,
            alibi=alibi,
            use_cache=use_cache,
            output_attentions=output_attentions,
            position_embeddings=position_embeddings,
        )
        if self.two_norms:
            normalized = stream.norm(self.ln_mlp)
        elif not parallel:
            stream.add(attended, config.attention_dropout)
            normalized = stream.norm(self.post_attention_layernorm)
        expanded = self.mlp(normalized)
        stream.add(expanded + attended if parallel else expanded, config.hidden_dropout)
        return stream.leave(), weights


FAMILY = Family(
    name="falcon",
    attention="rotary positions or ALiBi, one key head for all queries or grouped queries",
    sites=(
        Site("attention", FalconAttention),
        Site("activation", FalconMLP),
        Site("residual_norm", FalconDecoderLayer),
    ),
    limits=("caches hold the keys of grouped queries once a query head, as the original's do",),
)
