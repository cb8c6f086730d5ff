"""The self-attention of BERT and the families made after it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fastattn.layers import FusedLayer, project
from fastattn.models.interface import attention_forward

__all__ = ["FusedSelfAttention"]


class FusedSelfAttention(FusedLayer):
    """Query, key and value in one packed projection, then attention; the cache and the mask as the original
    has them.
    """

    projection_names: ClassVar[tuple[str, str, str]] = ("query", "key", "value")
    dropout_name: ClassVar[str] = "dropout"
    head_dim_name: ClassVar[str] = "attention_head_size"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:2], -1, getattr(self, self.head_dim_name))
        query, key, value = (
            x.view(shape).transpose(1, 2)
            for x in project(hidden_states, [getattr(self, name) for name in self.projection_names])
        )
        if past_key_values is not None:
            # An encoder-decoder cache holds the self-attention's part under a name of its own.
            cache = getattr(past_key_values, "self_attention_cache", past_key_values)
            key, value = cache.update(key, value, self.layer_idx)
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=getattr(self, self.dropout_name).p if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return out.flatten(2), weights
