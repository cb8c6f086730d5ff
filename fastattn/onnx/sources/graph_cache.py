"""A decoder's cache while its graph is traced: what transformers' models and attention layers ask of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import and_masks, causal_mask_function, sliding_window_overlay

from fastattn.models.interface import attention_forward
from fastattn.onnx.cache_append import append

__all__ = ["IMPLEMENTATION", "graph_cache"]

# Our attention function beside a mask function of its own: see `_mask_of_keys`.
IMPLEMENTATION = "fastattn_graph"


class _GraphLayer(CacheLayerMixin):
    """One layer's keys and values."""

    is_sliding = False

    def __init__(self, past: tuple[Tensor, Tensor], attention_mask: Tensor, tokens: Tensor) -> None:
        super().__init__()
        self._past, self._mask, self._tokens = past, attention_mask, tokens
        self.present: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, *args: Any) -> None:
        """Nothing is missing: the past is there."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        key, value = (
            append(past, new, self._mask, self._tokens)
            for past, new in zip(self._past, (key_states, value_states), strict=True)
        )
        self.present = key, value
        return key, value

    def get_seq_length(self) -> int:
        return self._mask.shape[1] - self._tokens.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._mask.shape[1], 0

    def get_max_length(self) -> int:
        return -1


def graph_cache(past: Sequence[tuple[Tensor, Tensor]], attention_mask: Tensor, tokens: Tensor) -> Cache:
    """A transformers cache of `past`, key and value [B, H, P, D] of every layer, for tokens [B, S] under a
    mask [B, T]; afterwards each of its `layers` has `present`, key and value [B, H, T, D].
    """
    return Cache(layers=[_GraphLayer(each, attention_mask, tokens) for each in past])


# What transformers' closures are recognized by: two functions joined, and a window.
_BOTH = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__


def _mask_of_keys(
    mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """The attention mask as it is, [B, T]: causality and the window are what the layers say themselves.

    Raises:
        ValueError: another pattern of visible keys.
    """
    inner = mask_function
    if getattr(inner, "__code__", None) is _BOTH:
        overlay, inner = inner.__closure__[0].cell_contents
        if getattr(overlay, "__code__", None) is not _WINDOW:
            inner = None
    if inner is not causal_mask_function:
        raise ValueError(
            "the model hides other keys than those of the future, of a sliding window and of padding; such a "
            "decoder is not exported"
        )
    return attention_mask


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, _mask_of_keys)
