"""Decoder layers and MLPs that several families share the shape of, written with a residual stream."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from fastattn.layers import FusedLayer, ResidualLayer, activated_linear, cannot_fuse_activation, project

__all__ = ["FusedMLP", "PreNormDecoderLayer", "SandwichNormDecoderLayer"]


class FusedMLP(FusedLayer):
    """contract(gelu(expand(x))), the first product's bias and the activation in one operation."""

    expand_name: ClassVar[str]
    contract_name: ClassVar[str]
    activation_name: ClassVar[str] = "act"
    dropout_name: ClassVar[str | None] = None

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return cannot_fuse_activation(getattr(module, cls.activation_name), getattr(module, cls.expand_name))

    def forward(self, hidden_states: Tensor) -> Tensor:
        modules = self._modules
        expand, contract = modules[self.expand_name], modules[self.contract_name]
        assert expand is not None and contract is not None
        expanded = activated_linear(hidden_states, expand, getattr(self, self.activation_name))
        contracted = project(expanded, [contract])[0]
        return contracted if self.dropout_name is None else getattr(self, self.dropout_name)(contracted)


class PreNormDecoderLayer(ResidualLayer):
    """x + attention(norm(x)), then x + mlp(norm(x)): Llama, Mistral, Qwen, gpt-oss."""

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
        if self.gains_nothing(hidden_states):
            original: Tensor = super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            return original
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=stream.norm(self.input_layernorm),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        stream.add(attended)
        result = self.mlp(stream.norm(self.post_attention_layernorm))
        # A mixture of experts also returns its routing.
        stream.add(result[0] if isinstance(result, tuple) else result)
        return stream.leave()


class SandwichNormDecoderLayer(ResidualLayer):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x))): Gemma 2 and 3."""

    entry_norm_name: ClassVar[str] = "input_layernorm"

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.gains_nothing(hidden_states):
            original: Tensor = super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
            return original
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=stream.norm(self.input_layernorm),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        stream.add(self.post_attention_layernorm(attended))
        expanded = self.mlp(stream.norm(self.pre_feedforward_layernorm))
        stream.add(self.post_feedforward_layernorm(expanded))
        return stream.leave()
