"""Swapped-in forwards of Hugging Face encoders: self-attention through our operations, and padding-free
execution.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor
from torch.nn.modules import module as nn_module

from fastattn.layers import FusedLayer, modules_below, project
from fastattn.models.interface import attention_forward, is_recording_hook, recorded_outputs
from fastattn.packing import Packing, PackingError, can_pack

__all__ = ["FusedSelfAttention", "PackedEncoder"]


class FusedSelfAttention(FusedLayer):
    """Query, key and value in one packed projection, then attention; the cache and the mask as the original
    has them.
    """

    projection_names: ClassVar[tuple[str, str, str]] = ("query", "key", "value")
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
            dropout=self.dropout.p if self.training else 0.0,  # type: ignore[arg-type,union-attr]
            scaling=self.scaling,  # type: ignore[arg-type]
            **kwargs,
        )
        return out.flatten(2), weights


class PackedEncoder(FusedLayer):
    """Runs the layers on real tokens only where the call allows it; `fastattn_padding` is the instance's
    choice.
    """

    fastattn_padding: str

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        packing = self._packing(hidden_states, attention_mask, args, kwargs)
        if packing is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        outputs = super().forward(packing.pack(hidden_states), None, *args, packing=packing, **kwargs)
        outputs.last_hidden_state = packing.unpack(outputs.last_hidden_state)
        return outputs

    def _packing(
        self, hidden_states: Tensor, mask: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Packing | None:
        if mask is None or self.fastattn_padding == "padded":
            return None
        reason = self._cannot_pack(hidden_states, mask, args, kwargs)
        if reason is None:
            return Packing.from_mask(mask)
        if self.fastattn_padding == "packed":
            raise PackingError(f'padding="packed" cannot be kept in this call: {reason}; use padding="auto"')
        return None

    def _cannot_pack(
        self, hidden_states: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call must run padded; None where it may be packed."""
        if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
            return f"its attention mask is {list(mask.shape)}, not [batch, length]"
        if any(argument is not None for argument in args) or any(
            kwargs.get(name) is not None
            for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
        ):
            return "it uses a cache or cross-attention"
        if not can_pack(mask):
            return "a compiled graph cannot hold a number of tokens that depends on the mask"
        if recorded_outputs():
            return "hidden states or attentions are recorded"
        if getattr(self.config, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward divides the padded length"
        if nn_module._has_any_global_hook():
            return "global module hooks would see packed tensors"
        for child in modules_below(self):
            hooks = (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
            if "forward" in child.__dict__ or not all(map(is_recording_hook, hooks)):
                return f"a hook on a {type(child).__name__} would see packed tensors"
            if child._backward_hooks or child._backward_pre_hooks:
                return f"a backward hook on a {type(child).__name__} would see packed tensors"
        return None
