"""fastattn among transformers' attention implementations: the attention function.

Importing this module registers it and the mask function under "fastattn" with transformers, the one thing
fastattn changes globally.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from fastattn import ops
from fastattn.models.masks import hides_nothing, padding_mask
from fastattn.models.packed_attention import packed_attention
from fastattn.models.recording import is_recording_hook, recorded_outputs, records_attentions
from fastattn.ops.attention_cpu import attend_at_once, attention_torch
from fastattn.ops.attention_reference import attention_weights
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.registration import runs_in_pytorch
from fastattn.ops.relative_bias import RelativeBias, relative_terms
from fastattn.ops.validation import autocast, is_traced
from fastattn.packing import Packing

__all__ = ["NAME", "attention_forward", "is_recording_hook", "padding_mask", "recorded_outputs"]

# Without "flash" in it: transformers takes such a name for a kernel to fetch from the Hub.
NAME = "fastattn"

# Keyword arguments that change the result and that this function does not compute: packing by bounds, paged
# caches, sparse attention by indices (which the eager functions find in the mask instead), sinks per query.
_UNSUPPORTED = frozenset(
    (
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "cache",
        "indices",
        "block_indices",
        "packing",
        "sinks",
    )
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Packing | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | RelativeBias | None = None,
    query_start: int | Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: [B, Hq, Sq, D]; of a packed batch [1, Hq, Tq, D].
        key, value: [B, Hkv, Sk, D], not repeated for grouped queries.
        attention_mask: None; the Packing of a packed batch, whose padding is already gone; bool [B, n], which
            of the first n keys are real, none of the others being there; or a mask of four dimensions, bool
            or added to the scores, which holds causality and window already and whatever a model lets see
            past them.
        sliding_window: keys a query sees in either direction, its own included.
        softcap: bound of the scaled scores (Gemma 2).
        s_aux: [Hq], attention sinks (gpt-oss).
        position_bias: added to the scores (T5): broadcastable to [B, Hq, Sq, Sk], or a RelativeBias.
        query_start: position of the first query among the keys; default: the last query at the last key.
        output_attentions: also return the weights, as where the caller asked transformers to record them.

    Returns:
        [B, Sq, Hq, D] contiguous, and the attention weights [B, Hq, Sq, Sk] where asked for.

    Raises:
        ValueError: a keyword argument that would change the result and is not supported, or a mask that does
            not fit.
    """
    if kwargs and not _UNSUPPORTED.isdisjoint(kwargs):
        for name in _UNSUPPORTED.intersection(kwargs):
            if kwargs[name] is not None:
                raise ValueError(
                    f'attn_implementation="{NAME}" does not support {name}; use "sdpa" or "eager"'
                )
    batch, _, length, head_dim = query.shape
    scale = head_dim**-0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", False) if is_causal is None else is_causal)
    # transformers counts a query's own position among the keys of its window.
    window = None if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    softcap = softcap or 0.0
    # Asked only where the layer does not say: outside the recorder a graph cannot read what it keeps.
    recorded = records_attentions() if output_attentions is None else output_attentions
    if isinstance(attention_mask, Packing):
        if recorded:
            raise ValueError(f'attn_implementation="{NAME}" returns no attention weights of a packed batch')
        packed = packed_attention(
            query,
            key,
            value,
            attention_mask,
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
            sinks=s_aux,
            position_bias=position_bias,
            dropout_p=dropout,
        )
        return packed, None
    mask = bias = None
    all_keys = keys = key.shape[2]
    if attention_mask is not None:
        if attention_mask.dim() == 4:
            causal, window = False, None
            if attention_mask.dtype is torch.bool:
                mask = attention_mask
            elif attention_mask.is_floating_point():
                bias = attention_mask
            else:
                raise ValueError(_bad_mask(attention_mask, query, keys))
            if isinstance(position_bias, RelativeBias) and query_start is None and length != keys:
                raise ValueError(
                    f"a mask {list(attention_mask.shape)} does not say where among {keys} keys the queries "
                    "are; a RelativeBias beside it needs query_start"
                )
        else:
            key, value, mask, position_bias = _of_keys_there(query, key, value, attention_mask, position_bias)
            keys = key.shape[2]
    relative = None
    if position_bias is not None:
        if isinstance(position_bias, RelativeBias):
            relative = position_bias
        else:
            bias = position_bias if bias is None else bias + position_bias
    # One query is the last: nothing follows it.
    causal = causal and (length > 1 or query_start is not None)
    # A layer's own tensors need none of the checks a caller's do, and on a CPU those show in small batches.
    in_pytorch = dropout == 0.0 and not recorded and runs_in_pytorch(query)
    if in_pytorch and relative is None and s_aux is None and softcap == 0.0:
        if not causal and window is None:
            at_once = True
        else:
            # Without a mask of its own, the kernel knows causality of as many queries as keys.
            at_once = query_start is None and (window is None or keys <= window[0] + 1)
            at_once = at_once and (not causal or (mask is None and bias is None and length == keys))
        if (
            at_once
            and not torch.is_autocast_enabled(query.device.type)
            # A learned bias would leave the scores of all queries to autograd.
            and (bias is None or (bias.dtype == query.dtype and not bias.requires_grad))
            and head_dim == value.shape[3]
            and batch * length * keys
        ):
            if mask is not None and mask.dim() == 2:
                mask = mask.view(batch, 1, 1, keys)
            if bias is not None:
                mask = bias if mask is None else torch.where(mask, bias, float("-inf"))
            out = attend_at_once(query, key, value, mask, causal, scale)
            return out.transpose(1, 2).contiguous(), None
    if isinstance(query_start, Tensor):
        query_start = query_start.reshape(-1).expand(batch)
    if not (in_pytorch or recorded):
        attended = ops.attention(
            query,
            key,
            value,
            mask=mask,
            bias=bias,
            relative_bias=relative,
            causal=causal,
            query_start=query_start,
            window=window,
            scale=scale,
            softcap=softcap,
            sinks=s_aux,
            dropout_p=dropout,
        )
        assert isinstance(attended, Tensor)
        return attended.transpose(1, 2).contiguous(), None
    left, right = window or (-1, -1)
    starts = query_start if isinstance(query_start, Tensor) else None
    terms = AttentionTerms(
        mask=mask,
        bias=bias,
        causal=causal,
        query_start=query_start if isinstance(query_start, int) else keys - length,
        query_starts=starts,
        window_left=left,
        window_right=right,
        scale=scale,
        softcap=softcap,
        sinks=s_aux,
        **relative_terms(relative),
    )
    query, key, value = autocast(query, key, value)
    if recorded:
        return _with_weights(query, key, value, terms, dropout, all_keys)
    in_tiles, _ = attention_torch(query, key, value, terms)
    return in_tiles.transpose(1, 2).contiguous(), None


def _of_keys_there(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    position_bias: Tensor | RelativeBias | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | RelativeBias | None]:
    """Keys, values, mask and bias of the first n keys, where a mask [B, n] says that no others are there."""
    keys = key.shape[2]
    if mask.dtype is not torch.bool or mask.dim() != 2:
        raise ValueError(_bad_mask(mask, query, keys))
    rows, there = mask.shape
    if rows != query.shape[0] or there > keys:
        raise ValueError(_bad_mask(mask, query, keys))
    if there < keys:
        key, value = key[:, :, :there], value[:, :, :there]
        if isinstance(position_bias, Tensor) and position_bias.shape[-1] == keys:
            position_bias = position_bias[..., :there]
    return key, value, None if hides_nothing(mask) and not is_traced(mask) else mask, position_bias


def _bad_mask(mask: Tensor, query: Tensor, keys: int) -> str:
    batch, _, length, _ = query.shape
    return (
        f'attn_implementation="{NAME}": attention_mask is {mask.dtype} {list(mask.shape)}; it must be bool '
        f"[{batch}, up to {keys}], or bool or floating point and broadcastable to [{batch}, heads, {length}, "
        f"{keys}]"
    )


def _with_weights(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, dropout: float, keys: int
) -> tuple[Tensor, Tensor]:
    """The output and the weights themselves, zero for keys that are not there."""
    weights = attention_weights(query, key, terms)
    weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0.0)
    group = query.shape[1] // value.shape[1]
    out = (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous()
    return out, nn.functional.pad(weights, (0, keys - weights.shape[3]))


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
