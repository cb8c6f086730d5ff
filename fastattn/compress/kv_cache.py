"""Keys and values of past tokens in eight bits: caches that take the place of transformers' dynamic one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

__all__ = [
    "KV_CACHES",
    "QuantizedCache",
    "QuantizedLayer",
    "QuantizedSlidingWindowLayer",
    "cache_bytes",
    "quantized_cache_kind",
    "stop_quantized_cache",
    "use_quantized_cache",
]

# Kind -> dtype and largest number.
KV_CACHES: dict[str, tuple[torch.dtype, float]] = {
    "int8": (torch.int8, 127.0),
    "fp8": (torch.float8_e4m3fn, 448.0),
}


@dataclass(frozen=True, eq=False)
class _States:
    """Keys or values: numbers [B, H, S, D] times scales float32 [B, H, S, 1], one a token and head."""

    numbers: Tensor
    scales: Tensor

    @classmethod
    def of(cls, states: Tensor, kind: str) -> _States:
        dtype, largest = KV_CACHES[kind]
        wide = states.detach().float()
        # A row of zeros stays one; inf and NaN become NaN, in their row alone.
        scales = wide.abs().amax(dim=-1, keepdim=True).div_(largest)
        scales = scales.clamp_(min=torch.finfo(torch.float32).tiny)
        # Not in place: a float32 state is the model's own.
        numbers = wide / scales
        return cls((numbers.round_() if kind == "int8" else numbers).to(dtype), scales)

    def map(self, change: Callable[[Tensor], Tensor]) -> _States:
        return _States(change(self.numbers), change(self.scales))

    def followed_by(self, new: _States) -> _States:
        return _States(
            torch.cat([self.numbers, new.numbers], dim=2), torch.cat([self.scales, new.scales], dim=2)
        )

    def joined(self, new: Tensor) -> Tensor:
        """These and `new` [B, H, L, D], as one tensor in `new`'s dtype."""
        batch, heads, length, size = self.numbers.shape
        states = new.new_empty(batch, heads, length + new.shape[2], size)
        # One tensor written twice: of 512 tokens, half the time of a product and a concatenation.
        states[:, :, :length] = self.numbers
        states[:, :, :length] *= self.scales
        states[:, :, length:] = new
        return states

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.numbers.to(torch.float32, copy=True).mul_(self.scales).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + self.scales.nbytes


class QuantizedLayer(DynamicLayer):
    """One layer's keys and values in eight bits, each token of each head with a scale of its own.

    What a call brings is used as it is in that call, and quantized once, for the later ones: a prompt's own
    logits do not change. `keys` and `values` read as tensors [B, H, S, D] of the model's dtype, computed anew
    each time. Gradients do not flow into earlier calls.

    Args:
        kind: "int8", or "fp8" (e4m3; slow on a CPU, which has no instruction for it).
    """

    def __init__(self, kind: str = "int8", **options: Any) -> None:
        _check_kind(kind)
        self.kind = kind
        self._keys: _States | None = None
        self._values: _States | None = None
        super().__init__(**options)

    @property
    def keys(self) -> Tensor | None:
        return None if self._keys is None else self._keys.dequantized(self.dtype)

    @keys.setter
    def keys(self, states: Tensor | None) -> None:
        self._keys = None if states is None or not states.numel() else _States.of(states, self.kind)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.dequantized(self.dtype)

    @values.setter
    def values(self, states: Tensor | None) -> None:
        self._values = None if states is None or not states.numel() else _States.of(states, self.kind)

    @property
    def nbytes(self) -> int:
        """Bytes held: a quarter of float32's, and four a token and head."""
        return sum(states.nbytes for states in (self._keys, self._values) if states is not None)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, L, D]; returns all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new_keys, new_values = _States.of(key_states, self.kind), _States.of(value_states, self.kind)
        if self._keys is None or self._values is None:
            self._keys, self._values = new_keys, new_values
            return key_states, value_states
        keys, values = self._keys.joined(key_states), self._values.joined(value_states)
        self._keys = self._keys.followed_by(new_keys)
        self._values = self._values.followed_by(new_values)
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self._keys is None else self._keys.numbers.shape[2]

    def reset(self) -> None:
        self._keys = self._values = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: a positive number.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a negative number; got {tokens_to_remove}")
        if tokens_to_remove:
            self._map(lambda x: x[:, :, :tokens_to_remove])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices, ...])

    def offload(self) -> None:
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._map(lambda x: x.to(self.device, non_blocking=True))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._keys = None if self._keys is None else self._keys.map(change)
        self._values = None if self._values is None else self._values.map(change)


class QuantizedSlidingWindowLayer(QuantizedLayer, DynamicSlidingWindowLayer):
    """As `QuantizedLayer`, of a layer that attends to its last `sliding_window` tokens: it holds no more."""

    def __init__(self, kind: str, sliding_window: int) -> None:
        super().__init__(kind, sliding_window=sliding_window)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, L, D]; returns those that the new tokens may attend to, and more
        where the first of many sees further back than the last.
        """
        keys, values = super().update(key_states, value_states)
        self.cumulative_length += key_states.shape[2]
        if self.record_past:
            # Whoever asked for the past crops it; until then the mask is made for the window alone.
            visible = self.sliding_window - 1 + key_states.shape[2]
            return keys[:, :, -visible:], values[:, :, -visible:]
        self._keep_window()
        return keys, values

    def get_seq_length(self) -> int:
        return int(self.cumulative_length)

    def reset(self) -> None:
        super().reset()
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens, and what is then before the window.

        Raises:
            RuntimeError: tokens before the window are needed again and were not recorded.
            ValueError: a positive number.
        """
        if self.cumulative_length >= self.sliding_window and not self.record_past:
            raise RuntimeError(
                "crop after the sliding window is full needs the tokens before it: call "
                "activate_past_recording first"
            )
        super().crop(tokens_to_remove)
        self.cumulative_length = max(self.cumulative_length + tokens_to_remove, 0)
        self._keep_window()

    def _keep_window(self) -> None:
        if self._keys is not None and self._keys.numbers.shape[2] >= self.sliding_window:
            start = self._keys.numbers.shape[2] - self.sliding_window + 1
            # Copied: a view would keep the whole prompt.
            self._map(lambda x: x[:, :, start:].clone())


class QuantizedCache(DynamicCache):
    """transformers' dynamic cache with its keys and values in eight bits, for `generate` or a loop of calls.

    Grouped queries, beams, left-padded batches, assisted generation, sliding windows and cross-attention work
    as with `DynamicCache`; layers of linear attention keep their state as it is.

    Args:
        config: the model's.
        kind: "int8" or "fp8".

    Raises:
        ValueError: another kind, or a layer type whose cache is of another make.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> cache = QuantizedCache(config, "int8")
        >>> _ = model(torch.arange(10).view(1, 10), past_key_values=cache)
        >>> cache.nbytes, 2 * 2 * 10 * 64 * 4
        (2880, 10240)
    """

    def __init__(self, config: Any, kind: str = "int8") -> None:
        _check_kind(kind)
        super().__init__(config=config)
        _quantize_layers(self, kind)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys, values and scales."""
        return cache_bytes(self)


def cache_bytes(cache: Any) -> int:
    """Bytes of keys, values and their scales that a transformers cache holds, of any kind."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    held = 0
    for layer in cache.layers:
        if isinstance(layer, QuantizedLayer):
            held += layer.nbytes
        else:
            tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
            held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return held


def use_quantized_cache(model: nn.Module, kind: str) -> None:
    """Keep past keys and values in eight bits wherever `model` is handed an empty dynamic cache: in
    `generate`, whatever its strategy, and in a loop of calls with one `DynamicCache`.

    A forward pre-hook does it, so that the model can still be copied, pickled and saved; the hook is not
    saved with it. A cache that holds something already is left as it is, and so, with a warning, is a static
    one.

    Args:
        model: a transformers model that generates, or one that holds it (PEFT's).
        kind: "int8" or "fp8".

    Raises:
        ValueError: another kind, a model that does not generate from a cache, or a layer whose cache is of
            another make.

    Example:
        >>> import torch, transformers
        >>> config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=2, num_hidden_layers=2)
        >>> model = transformers.LlamaForCausalLM(config).eval()
        >>> use_quantized_cache(model, "int8")
        >>> cache = transformers.DynamicCache(config=config)
        >>> _ = model(torch.arange(10).view(1, 10), past_key_values=cache)
        >>> cache.layers
        [QuantizedLayer, QuantizedLayer]
    """
    _check_kind(kind)
    owner = _cache_owner(model)
    if owner is None:
        raise ValueError(
            f"kv_cache is {kind!r}, but {type(model).__name__} is no transformers model that generates from "
            "a cache"
        )
    QuantizedCache(owner.config, kind)  # raises where a layer has another kind of cache
    stop_quantized_cache(model)
    owner.register_forward_pre_hook(_CacheQuantizer(kind), with_kwargs=True)


def stop_quantized_cache(model: nn.Module) -> None:
    """Undo `use_quantized_cache`; nothing where it was not used."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if type(hook) is _CacheQuantizer]:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def quantized_cache_kind(model: nn.Module) -> str | None:
    """What `use_quantized_cache` was called with; None where it was not."""
    hooks = (hook for module in model.modules() for hook in module._forward_pre_hooks.values())
    return next((hook.kind for hook in hooks if type(hook) is _CacheQuantizer), None)


@dataclass(frozen=True)
class _CacheQuantizer:
    """The hook: makes the empty dynamic caches of a call's arguments quantized ones."""

    kind: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for cache in (*args, kwargs.get("past_key_values")):
            if isinstance(cache, EncoderDecoderCache):
                self._quantize(cache.self_attention_cache)
                self._quantize(cache.cross_attention_cache)
            elif hasattr(cache, "layers"):
                self._quantize(cache)

    def _quantize(self, cache: Any) -> None:
        if type(cache) is DynamicCache:
            if not any(getattr(layer, "is_initialized", False) for layer in cache.layers):
                _quantize_layers(cache, self.kind)
        elif not isinstance(cache, QuantizedCache):
            warnings.warn(
                f"past_key_values is a {type(cache).__name__}, which keeps its precision: only dynamic "
                f"caches are kept in {self.kind}",
                stacklevel=2,
            )


def _cache_owner(model: nn.Module) -> Any:
    """The outermost transformers model of `model` that generates from a cache."""
    for module in model.modules():
        if not (isinstance(module, PreTrainedModel) and module.can_generate()):
            continue
        if "past_key_values" in signature(type(module).forward).parameters:
            return module
    return None


def _quantize_layers(cache: Any, kind: str) -> None:
    """Exchange the empty layers of a dynamic cache, and what those still to come will be."""
    cache.layers = [_quantized_layer(layer, kind, index) for index, layer in enumerate(cache.layers)]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = partial(QuantizedLayer, kind)


def _quantized_layer(layer: Any, kind: str, index: int) -> Any:
    if isinstance(layer, QuantizedLayer):
        return layer
    if type(layer) is DynamicSlidingWindowLayer:
        quantized = QuantizedSlidingWindowLayer(kind, layer.sliding_window)
        quantized.record_past = layer.record_past
        return quantized
    if type(layer) is DynamicLayer:
        return QuantizedLayer(kind)
    keeps_no_tokens = isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(
        layer, DynamicLayer
    )
    if keeps_no_tokens or type(layer).__name__ == "DummyLayer":
        return layer
    raise ValueError(
        f"layer {index} caches its keys and values in a {type(layer).__name__}, which has no {kind} form; "
        "leave kv_cache None"
    )


def _check_kind(kind: str) -> None:
    if kind not in KV_CACHES:
        raise ValueError(f"kv_cache is {kind!r}; accepted are {', '.join(map(repr, KV_CACHES))} and None")
