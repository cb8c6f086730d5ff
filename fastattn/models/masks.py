"""The mask function fastattn registers with transformers: a padding mask stays two-dimensional where padding,
with or without causality, is all there is to hide; every other mask transformers builds itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    eager_mask,
    sdpa_mask,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)

from fastattn.models.dispatch import family_reason, mask_form
from fastattn.ops.validation import is_traced

__all__ = ["hides_nothing", "padding_mask"]

# What transformers' closures are recognized by: two functions joined, and the two kinds of window.
_BOTH = and_masks(causal_mask_function).__code__
_WINDOW = sliding_window_overlay(1).__code__
_BIDIRECTIONAL_WINDOW = sliding_window_bidirectional_overlay(1).__code__

# Architectures whose layers are given their bidirectional window beside the mask and apply it themselves.
_APPLY_THEIR_WINDOW = ("modernbert",)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int | Tensor = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function transformers calls.

    Args:
        batch_size: B.
        q_length: Sq; kv_length: Sk, the keys of the cache with those a static cache has room for.
        q_offset: position of the first query; kv_offset that of the first key, as a sliding cache drops them.
        mask_function: which keys a query sees but for padding.
        attention_mask: bool [B, n], True = real.
        allow_is_causal_skip, allow_is_bidirectional_skip: False where the caller needs four dimensions.
        config: the model's.
        kwargs: for transformers' own builders.

    Returns:
        None where nothing but the future is hidden; bool [B, n]: likewise of the real keys alone, n the keys
        there are so far, the last of them at the last query's position; or a mask of four dimensions, which
        is complete.

    Raises:
        ValueError: for an architecture whose layers would not ask for the attention function.
    """
    form = _form(type(config))
    if form.startswith("refused"):
        raise ValueError(_refusal(config))
    rest = dict(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **kwargs,
    )
    if form == "additive":
        additive: Tensor | None = eager_mask(**rest)
        return additive
    stays = attention_mask is None or (attention_mask.dim() == 2 and attention_mask.shape[0] == batch_size)
    kind = None
    if form == "padding" and stays and not use_vmap and not isinstance(kv_offset, Tensor) and kv_offset == 0:
        kind = _kind(mask_function, kv_length, config)
    if kind == "bidirectional" and allow_is_bidirectional_skip:
        return _of_real_keys(attention_mask, kv_length, kv_length, batch_size, device)
    position = _number(q_offset, q_length) if kind == "causal" and allow_is_causal_skip else None
    if position is not None:
        length = position + q_length
        # A mask as long as the keys, where fewer are there, belongs to a static cache, or to no cache and too
        # few queries: the complete mask tells them apart.
        longer = attention_mask is not None and attention_mask.shape[1] == kv_length
        if length == kv_length or (length < kv_length and not longer):
            return _of_real_keys(attention_mask, length, kv_length, batch_size, device)
    # Where queries and keys are the same tokens, an absent mask means causality to every cache.
    skip = form == "padding" and allow_is_causal_skip and q_length == kv_length and position == 0
    mask: Tensor | None = sdpa_mask(**rest, allow_is_causal_skip=skip)
    return mask


def hides_nothing(mask: Tensor) -> bool:
    """Whether a mask [B, n] is the one `padding_mask` makes to say that there are n keys, all real."""
    return mask.stride() == (0, 0)


# Not on the cached function itself: Dynamo looks through the cache at the function it holds, which is not
# marked.
@torch.compiler.assume_constant_result
def _form(config_class: type) -> str:
    """`mask_form`, or "refused"; a constant to a graph, which cannot read the code of layers."""
    return _form_of_layers(config_class)


@cache
def _form_of_layers(config_class: type) -> str:
    return "refused" if family_reason(config_class) is not None else mask_form(config_class)


def _refusal(config: Any) -> str:
    return (
        f'attn_implementation="fastattn" does nothing for {type(config).__name__}: '
        f'{family_reason(type(config))}; load the model with attn_implementation="eager" and call '
        "fastattn.optimize(model)"
    )


def _enclosed(function: Any) -> Any:
    """The one value a closure holds."""
    return function.__closure__[0].cell_contents


def _kind(mask_function: Any, kv_length: int, config: Any) -> str | None:
    """What a mask function hides beside padding: "causal", "bidirectional", or None for anything else."""
    if mask_function is causal_mask_function:
        return "causal"
    if mask_function is bidirectional_mask_function:
        return "bidirectional"
    # Dynamo makes functions of its own of closures.
    if torch.compiler.is_dynamo_compiling() or getattr(mask_function, "__code__", None) is not _BOTH:
        return None
    joined = _enclosed(mask_function)
    overlay, base = joined if len(joined) == 2 else (None, None)
    code = getattr(overlay, "__code__", None)
    if code is _WINDOW and base is causal_mask_function:
        # As long as no key is out of the window, it hides nothing.
        return "causal" if _enclosed(overlay) >= kv_length else None
    if code is _BIDIRECTIONAL_WINDOW and base is bidirectional_mask_function:
        window = _enclosed(overlay)
        applied = config.model_type in _APPLY_THEIR_WINDOW and config.sliding_window == window
        return "bidirectional" if applied or window >= kv_length - 1 else None
    return None


def _number(q_offset: int | Tensor, q_length: int) -> int | None:
    """The position of the first query, unless reading it would break a graph or make every step of decoding
    wait for a GPU.
    """
    if not isinstance(q_offset, Tensor):
        return q_offset
    if is_traced(q_offset) or (q_length == 1 and q_offset.device.type != "cpu"):
        return None
    return int(q_offset)


def _of_real_keys(
    mask: Tensor | None, length: int, kv_length: int, batch_size: int, device: torch.device | str
) -> Tensor | None:
    """The mask of the first `length` of `kv_length` keys; None where it would hide none of them."""
    if mask is not None:
        if mask.shape[1] < length:
            mask = torch.nn.functional.pad(mask, (0, length - mask.shape[1]))
        mask = mask[:, :length]
        if is_traced(mask):
            return mask
        if not bool(mask.all()):
            return mask.clone() if hides_nothing(mask) else mask
    if length == kv_length:
        return None
    return torch.ones(1, 1, dtype=torch.bool, device=device).expand(batch_size, length)
