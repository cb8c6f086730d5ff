"""What the graphs of an encoder-decoder are traced from: the encoder, and the decoder between its caches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.masking_utils import causal_mask_function
from transformers.modeling_outputs import BaseModelOutput

from fastattn.models.interface import attention_forward
from fastattn.onnx.cross_cache import cached_or_fresh
from fastattn.onnx.last_positions import LOGITS_TO_KEEP, keep_last_positions
from fastattn.onnx.sources.graph_cache import graph_cache

__all__ = [
    "CrossAttention",
    "DecodingStep",
    "EncoderPass",
    "cross_attentions",
    "past_heads",
    "without_causal_masks",
]


@dataclass(frozen=True)
class CrossAttention:
    """One decoder layer's attention to the encoder's output."""

    key: nn.Module
    value: nn.Module
    heads: int
    head_dim: int

    def fresh(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of [B, S, N]: [B, H, S, D] each."""
        keys, values = (
            layer(states).view(*states.shape[:2], self.heads, self.head_dim).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        return keys, values


def cross_attentions(model: Any) -> list[CrossAttention]:
    """Those of every decoder layer, in order."""
    decoder = model.get_decoder()
    if hasattr(decoder, "block"):
        modules = [block.layer[1].EncDecAttention for block in decoder.block]
        return [CrossAttention(each.k, each.v, each.n_heads, each.key_value_proj_dim) for each in modules]
    modules = [layer.encoder_attn for layer in decoder.layers]
    return [CrossAttention(each.k_proj, each.v_proj, each.num_heads, each.head_dim) for each in modules]


def past_heads(model: Any) -> list[int]:
    """How many heads the cache of every decoder layer's own tokens has: pruned layers differ."""
    decoder = model.get_decoder()
    if hasattr(decoder, "block"):
        return [block.layer[0].SelfAttention.n_heads for block in decoder.block]
    return [layer.self_attn.num_heads for layer in decoder.layers]


class EncoderPass(nn.Module):
    """The encoder alone."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, **inputs: Tensor) -> Tensor:
        states: Tensor = self.encoder(**inputs).last_hidden_state
        return states


class DecodingStep(nn.Module):
    """The decoder on new tokens after those in its caches, and the caches grown by them.

    Called with the inputs of `decoder_model_merged`; returns the logits and, layer by layer, the four present
    tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> tuple[Tensor, ...]:
        model: Any = self.model
        layers = cross_attentions(model)
        states, tokens = inputs["encoder_hidden_states"], inputs["input_ids"]
        own, given = (_past(inputs, side, len(layers)) for side in ("decoder", "encoder"))
        fresh = [x for layer in layers for x in layer.fresh(states)]
        crossed = cached_or_fresh(inputs["use_cache_branch"], given, fresh)
        # Only its length is read: that of the caches grown by the tokens.
        there = tokens.new_ones(tokens.shape[0], own[0].shape[2] + tokens.shape[1])
        cache = EncoderDecoderCache(
            graph_cache(list(zip(own[::2], own[1::2], strict=True)), there, tokens), DynamicCache()
        )
        cache.cross_attention_cache.layers = [
            _filled(*pair) for pair in zip(crossed[::2], crossed[1::2], strict=True)
        ]
        cache.is_updated = dict.fromkeys(range(len(layers)), True)
        head, keep = model.get_output_embeddings(), inputs[LOGITS_TO_KEEP]
        hook = head.register_forward_pre_hook(lambda _, args: (keep_last_positions(args[0], keep),))
        mask = inputs.get("encoder_attention_mask")
        try:
            with without_causal_masks(model):
                logits = model(
                    decoder_input_ids=tokens,
                    encoder_outputs=BaseModelOutput(last_hidden_state=states),
                    past_key_values=cache,
                    use_cache=True,
                    **({} if mask is None else {"attention_mask": mask}),
                ).logits
        finally:
            hook.remove()
        present: list[Tensor] = []
        for index, layer in enumerate(cache.self_attention_cache.layers):
            assert layer.present is not None, "a layer did not ask the cache"
            present += (*layer.present, *crossed[2 * index : 2 * index + 2])
        return (logits, *present)


def _past(inputs: Mapping[str, Tensor], side: str, layers: int) -> list[Tensor]:
    return [
        inputs[f"past_key_values.{index}.{side}.{kind}"]
        for index in range(layers)
        for kind in ("key", "value")
    ]


def _filled(keys: Tensor, values: Tensor) -> DynamicLayer:
    """A layer of a cache that nothing is added to."""
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


# Our attention function, and masks of the encoder's padding alone: every one of the decoder's tokens is real,
# and that they see none after themselves is what the attention layers say.
_IMPLEMENTATION = "fastattn_step"


def _mask_of_the_encoder(
    mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    return None if mask_function is causal_mask_function else attention_mask


AttentionInterface.register(_IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(_IMPLEMENTATION, _mask_of_the_encoder)


@contextmanager
def without_causal_masks(model: nn.Module) -> Iterator[None]:
    """The model's layers use `_IMPLEMENTATION` within."""
    configs = {
        id(config): config for config in (getattr(m, "config", None) for m in model.modules()) if config
    }
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = _IMPLEMENTATION
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
