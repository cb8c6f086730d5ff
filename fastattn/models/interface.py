"""fastattn among transformers' attention implementations: the attention function, the mask function, and
recording.

Importing this module registers both under "fastattn" with transformers, the one thing fastattn changes
globally.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, sdpa_mask
from transformers.utils import output_capturing

from fastattn import ops
from fastattn.ops.attention_cpu import attend_sequences, attention_torch
from fastattn.ops.attention_reference import attention_weights
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.registration import runs_in_pytorch
from fastattn.ops.validation import autocast, is_traced
from fastattn.packing import Packing

__all__ = ["NAME", "attention_forward", "is_recording_hook", "padding_mask", "recorded_outputs"]

# Without "flash" in it: transformers takes such a name for a kernel to fetch from the Hub.
NAME = "fastattn"

_NOTHING: frozenset[str] = frozenset()

# Keyword arguments that change the result and that this function does not compute: packing by bounds, paged
# caches, sparse attention by indices (which the eager functions find in the mask instead), sinks per query.
_UNSUPPORTED = frozenset(
    (
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "cache",
        "indices",
        "block_indices",
        "sinks",
    )
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    packing: Packing | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function transformers calls.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: [B, Hq, Sq, D]; with `packing` [1, Hq, Tq, D].
        key, value: [B, Hkv, Sk, D], not repeated for grouped queries.
        attention_mask: bool padding mask [B, Sk], bool or additive 4-D mask, or None. One of four dimensions
            holds causality and window already, and whatever a model lets see past them.
        packing: the layout of a packed batch, whose padding is already gone.
        sliding_window: keys a query sees in either direction, its own included.
        softcap: bound of the scaled scores (Gemma 2).
        s_aux: [Hq], attention sinks (gpt-oss).
        position_bias: broadcastable to [B, Hq, Sq, Sk], added to the scores (T5).

    Returns:
        [B, Sq, Hq, D] contiguous, and the attention weights where the caller asked transformers to record
        them.

    Raises:
        ValueError: a keyword argument that would change the result and is not supported.
    """
    for name in _UNSUPPORTED.intersection(kwargs):
        if kwargs[name] is not None:
            raise ValueError(f'attn_implementation="{NAME}" does not support {name}; use "sdpa" or "eager"')
    plain = sliding_window is None and softcap is None and s_aux is None and position_bias is None
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    # A layer's own tensors need none of the checks a caller's do, and on a CPU those show in small batches.
    in_pytorch = dropout == 0.0 and runs_in_pytorch(query)
    if packing is not None:
        if position_bias is not None:
            raise ValueError(f'attn_implementation="{NAME}" does not support position_bias of a packed batch')
        q = query[0].transpose(0, 1)
        k, v = packing.keys(key[0].transpose(0, 1)), packing.keys(value[0].transpose(0, 1))
        if packing.bounds is not None and in_pytorch and plain:
            q, k, v = autocast(q, k, v)
            return attend_sequences(q, k, v, *packing.bounds, scale).unsqueeze(0), None
        out = ops.varlen_attention(
            q,
            k,
            v,
            packing.cu_seqlens_q,
            packing.cu_seqlens_k,
            packing.length,
            packing.length,
            window=_window(sliding_window),
            scale=scale,
            softcap=softcap or 0.0,
            sinks=s_aux,
            dropout_p=dropout,
        )
        assert isinstance(out, Tensor)
        return out.unsqueeze(0), None
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    complete = attention_mask is not None and attention_mask.dim() == 4
    causal = bool(causal) and query.shape[2] > 1 and not complete
    mask, bias = None, position_bias
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        mask = attention_mask
    elif attention_mask is not None:
        bias = attention_mask if bias is None else bias + attention_mask
    window = None if complete else _window(sliding_window)
    recorded = not recorded_outputs().isdisjoint(("attentions", "cross_attentions"))
    if recorded or (in_pytorch and plain):
        left, right = window or (-1, -1)
        terms = AttentionTerms(
            mask=mask,
            bias=bias,
            causal=causal,
            query_start=key.shape[2] - query.shape[2],
            window_left=left,
            window_right=right,
            scale=scale,
            softcap=softcap or 0.0,
            sinks=s_aux,
        )
        if not recorded:
            query, key, value = autocast(query, key, value)
            direct, _ = attention_torch(query, key, value, terms)
            return direct.transpose(1, 2).contiguous(), None
        weights = attention_weights(query, key, terms)
        weights = nn.functional.dropout(weights, p=dropout, training=dropout > 0.0)
        group = query.shape[1] // value.shape[1]
        out = (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2).contiguous()
        return out, weights
    out = ops.attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap or 0.0,
        sinks=s_aux,
        dropout_p=dropout,
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None


def _window(sliding_window: int | None) -> tuple[int, int] | None:
    """transformers counts a query's own position among the keys of its window."""
    return None if sliding_window is None else (sliding_window - 1, sliding_window - 1)


def padding_mask(
    *args: Any,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function transformers calls: a padding mask [B, Sk] stays two-dimensional.

    Only where padding is all there is to hide and the caller does not need four dimensions; every other mask
    (causal, sliding, packed) is built by transformers itself.

    Returns:
        None where nothing is hidden, bool [B, Sk], or bool [B, 1, Sq, Sk].
    """
    kwargs.pop("allow_is_causal_skip", None)
    if mask_function is not bidirectional_mask_function or not allow_is_bidirectional_skip or kv_offset != 0:
        mask: Tensor | None = sdpa_mask(
            *args,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            # The causal mask is always built: its absence would mean different things to different cache
            # types.
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            **kwargs,
        )
        return mask
    if attention_mask is None or (not is_traced(attention_mask) and bool(attention_mask.all())):
        return None
    return attention_mask


def recorded_outputs() -> frozenset[str]:
    """What transformers records in the forward now running: "hidden_states", "attentions", ..."""
    collected = output_capturing._active_collector.get()
    return frozenset(collected) if collected else _NOTHING


def is_recording_hook(hook: Any) -> bool:
    """Whether a forward hook is transformers' own recorder, idle unless something is recorded."""
    return getattr(hook, "__module__", None) == output_capturing.__name__


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, padding_mask)
