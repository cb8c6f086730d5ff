"""Layers of BART and the encoder-decoders made after it, written with a residual stream: normalized after
each addition (BART, Marian) or before each sublayer (mBART, Pegasus, Whisper).

Their encoders hold no stack of their own, so each encoder layer runs packed, and hands the packed tokens on.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from fastattn.layers import Border, FusedLayer, ResidualLayer, activated_linear, project
from fastattn.layers.border import is_differentiable
from fastattn.ops.registration import runs_in_pytorch

__all__ = [
    "LayerNorm",
    "PostNormDecoderLayer",
    "PostNormEncoderLayer",
    "PreNormCrossDecoderLayer",
    "PreNormEncoderLayer",
    "within_half",
]

# Below so many rows bfloat16's fused linear layers gain nothing either.
FEW_ROWS = 16


def within_half(x: Tensor) -> Tensor:
    """A float16 tensor with nothing beyond the largest number less 1,000, which leaves room to add to it."""
    limit = torch.finfo(torch.float16).max - 1000
    return x.clamp(min=-limit, max=limit)


def _calls_cost_most(x: Tensor) -> bool:
    """Whether the original's forward is as fast as any: in a step of decoding on a CPU nothing is fused, and
    every call more shows.
    """
    return runs_in_pytorch(x) and x.shape[0] * x.shape[1] < FEW_ROWS


class LayerNorm(FusedLayer, nn.LayerNorm):
    """The norm after an encoder's packed layers: of real tokens too, so that padding stays zero instead of
    becoming the norm's bias.
    """

    fastattn_original = nn.LayerNorm

    # Set on instances by `link_layers`: the border to the last layer.
    fastattn_packed_before: ClassVar[Border | None] = None

    def forward(self, input: Tensor) -> Tensor:
        before = self.fastattn_packed_before
        ahead = None if before is None else before.take(input)
        if ahead is None or not is_differentiable(ahead[2], input):
            return super().forward(input)
        _, packing, packed = ahead
        padded: Tensor = packing.unpack(super().forward(packed))
        return padded


class _Layer(ResidualLayer):
    """What all four layers share: the feed-forward part between its norm and its addition."""

    def feed_forward(self, x: Tensor) -> Tensor:
        fc1, fc2 = self._modules["fc1"], self._modules["fc2"]
        assert fc1 is not None and fc2 is not None
        expanded = activated_linear(x, fc1, self.activation_fn)
        if self.training:
            expanded = dropout(expanded, p=self.activation_dropout)
        return project(expanded, [fc2])[0]


class PostNormEncoderLayer(_Layer):
    """norm(x + attention(x)), then norm(x + mlp(x)): BART, Marian."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        if _calls_cost_most(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)
        stream.add(attended, self.dropout)
        hidden_states = stream.normalize(self.self_attn_layer_norm)
        stream.add(self.feed_forward(hidden_states), self.dropout)
        hidden_states = stream.normalize(self.final_layer_norm)
        if hidden_states.dtype == torch.float16 and not torch.isfinite(hidden_states).all():
            hidden_states = within_half(hidden_states)
        return hidden_states


class PostNormDecoderLayer(_Layer):
    """As `PostNormEncoderLayer`, with attention to an encoder's output in between."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        if _calls_cost_most(hidden_states):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                use_cache,
                **kwargs,
            )
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(
            hidden_states, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs
        )
        stream.add(attended, self.dropout)
        hidden_states = stream.normalize(self.self_attn_layer_norm)
        if encoder_hidden_states is not None:
            attended, _ = self.encoder_attn(
                hidden_states,
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            stream.add(attended, self.dropout)
            hidden_states = stream.normalize(self.encoder_attn_layer_norm)
        stream.add(self.feed_forward(hidden_states), self.dropout)
        return stream.normalize(self.final_layer_norm)


class PreNormEncoderLayer(_Layer):
    """x + attention(norm(x)), then x + mlp(norm(x)): mBART, Pegasus, Whisper."""

    entry_norm_name: ClassVar[str] = "self_attn_layer_norm"

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> Tensor:
        if _calls_cost_most(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=stream.norm(self.self_attn_layer_norm),
            attention_mask=attention_mask,
            **kwargs,
        )
        stream.add(attended, self.dropout)
        stream.add(self.feed_forward(stream.norm(self.final_layer_norm)), self.dropout)
        # The next layer's norm is that of the clamped sum, so it cannot be computed with the sum.
        return within_half(stream.value) if hidden_states.dtype == torch.float16 else stream.leave()


class PreNormCrossDecoderLayer(_Layer):
    """As `PreNormEncoderLayer`, with attention to an encoder's output in between."""

    entry_norm_name: ClassVar[str] = "self_attn_layer_norm"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> Tensor:
        if _calls_cost_most(hidden_states):
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                use_cache,
                **kwargs,
            )
        stream = self.residual_stream(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=stream.norm(self.self_attn_layer_norm),
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            **kwargs,
        )
        stream.add(attended, self.dropout)
        if encoder_hidden_states is not None:
            attended, _ = self.encoder_attn(
                hidden_states=stream.norm(self.encoder_attn_layer_norm),
                key_value_states=encoder_hidden_states,
                attention_mask=encoder_attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            stream.add(attended, self.dropout)
        stream.add(self.feed_forward(stream.norm(self.final_layer_norm)), self.dropout)
        return stream.leave()
