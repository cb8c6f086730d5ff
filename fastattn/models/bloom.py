"""The BLOOM family: ALiBi, which its attention computes itself, without transformers' attention interface."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import dropout
from transformers.models.bloom import modeling_bloom

from fastattn.layers import FusedLayer, ResidualLayer, activated_linear, is_observed, project
from fastattn.models.family import Family, Site
from fastattn.models.interface import attention_forward
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["FAMILY"]


def _in_slices(module: nn.Module) -> str | None:
    if module.pretraining_tp > 1 and module.slow_but_exact:  # type: ignore[operator]
        return "its output layer is computed in slices (slow_but_exact)"
    return None


class BloomAttention(FusedLayer, modeling_bloom.BloomAttention):
    fastattn_original = modeling_bloom.BloomAttention

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return _in_slices(module)

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Without `residual`, our block's call, nothing is added."""
        if output_attentions:
            weighted: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, use_cache, True, **kwargs
            )
            return weighted
        query, key, value = self._reshape(project(hidden_states, [self.query_key_value])[0])
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        if attention_mask is not None and not runs_in_pytorch(query):
            # ALiBi is the same for every query, and beside a bool mask it stays so: nothing as large as the
            # scores is written. Nothing is lost: the model takes no masks but its own, in which a key is
            # hidden or is not.
            attention_mask = attention_mask == 0
        attended, _ = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout.p if self.training else 0.0,
            scaling=self.inv_norm_factor,
            position_bias=alibi.view(query.shape[0], self.num_heads, 1, -1),
            output_attentions=False,
        )
        output = project(attended.flatten(2), [self.dense])[0]
        if residual is not None:
            output = residual + dropout(output, self.hidden_dropout, self.training)
        return output, None


class BloomMLP(FusedLayer, modeling_bloom.BloomMLP):
    fastattn_original = modeling_bloom.BloomMLP

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return _in_slices(module)

    def forward(self, hidden_states: Tensor, residual: Tensor | None) -> Tensor:
        """Without `residual`, our block's call, nothing is added."""
        expanded = activated_linear(hidden_states, self.dense_h_to_4h, self.gelu_impl)
        output = project(expanded, [self.dense_4h_to_h])[0]
        return output if residual is None else residual + dropout(output, self.hidden_dropout, self.training)


class BloomBlock(ResidualLayer, modeling_bloom.BloomBlock):
    fastattn_original = modeling_bloom.BloomBlock
    entry_norm_name: ClassVar[str] = "input_layernorm"

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        if module.apply_residual_connection_post_layernorm:
            return "its residuals are its norms' outputs (apply_residual_connection_post_layernorm)"
        return None

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor,
        attention_mask: Tensor | None,
        layer_past: Any = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attention, mlp = self.self_attention, self.mlp
        # The original's parts add the residual themselves, and a hook on one is to see the sum.
        ours = isinstance(attention, BloomAttention) and isinstance(mlp, BloomMLP)
        if output_attentions or not ours or is_observed(attention) or is_observed(mlp):
            whole: tuple[Tensor, Tensor | None] = super().forward(
                hidden_states, alibi, attention_mask, layer_past, use_cache, output_attentions, **kwargs
            )
            return whole
        stream = self.residual_stream(hidden_states)
        attended, _ = attention(
            stream.norm(self.input_layernorm),
            None,
            layer_past=layer_past,
            attention_mask=attention_mask,
            alibi=alibi,
            use_cache=use_cache,
        )
        stream.add(attended, attention.hidden_dropout)
        stream.add(mlp(stream.norm(self.post_attention_layernorm), None), mlp.hidden_dropout)
        return stream.leave(), None


FAMILY = Family(
    name="bloom",
    attention="ALiBi",
    sites=(
        Site("attention", BloomAttention),
        Site("activation", BloomMLP),
        Site("residual_norm", BloomBlock),
    ),
)
