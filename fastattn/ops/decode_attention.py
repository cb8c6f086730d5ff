"""Attention of the newest tokens over a cache of keys and values: contract and registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import runs_in_kernel
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.attention_validation import check_integers, check_score_terms, check_window
from fastattn.ops.decode_cache import DecodeCache
from fastattn.ops.decode_reference import decode_attention_reference, decode_attention_torch
from fastattn.ops.decode_validation import QUANTIZED, check_cache, check_cache_values
from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.relative_bias import RelativeBias, relative_terms
from fastattn.ops.validation import autocast

__all__ = ["decode_attention"]


def decode_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_lengths: Tensor,
    block_table: Tensor | None = None,
    *,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    window: int | tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the last few tokens of each sequence over its cache, causal among themselves.

    As `fastattn.ops.attention(..., causal=True, key_lengths=cache_lengths, query_start=cache_lengths - Sq)`;
    on a GPU the keys are split among programs (Dao et al., "Flash-Decoding", 2023), and the heads that share
    keys read them once. Pages are vLLM's (Kwon et al., "PagedAttention", 2023).

    Args:
        query: [B, Hq, Sq, D], Sq from 1 to 16; float16, bfloat16, float32 or float64, any strides; D up to
            256 on a GPU. Query i is token cache_lengths - Sq + i of its sequence.
        key_cache: [B, Hkv, S, D], Hq a multiple of Hkv; with `block_table` pages
            [blocks, block_size, Hkv, D]. Query's dtype, int8 or float8_e4m3fn; any strides. It holds the new
            tokens' keys already.
        value_cache: the same with Dv for D, in key_cache's dtype.
        cache_lengths: int32 or int64 [B]: keys of each sequence, the new ones included; what lies past them,
            or before the window, is never read. A sequence of 0, and queries before token 0, get zeros.
        block_table: int32 or int64 [B, n]: the pages of each sequence in order. Entries no key uses may be
            anything, such as -1.
        key_scale: float32 [Hkv], with an int8 or float8 cache only: keys are cache * scale.
        value_scale: float32 [Hkv], likewise.
        relative_bias: as in `fastattn.ops.attention`.
        alibi_slopes: float [Hq]: as in `fastattn.ops.attention`.
        window: how many keys before its own a query sees, -1 = all; or `fastattn.ops.attention`'s pair
            (left, right), whose right is -1 or 0, the same here.
        scale: default D ** -0.5.
        softcap: c > 0 bounds the scaled scores s to c * tanh(s / c); 0 = none.
        sinks: float [Hq]: one more logit a head in the softmax's denominator, neither scaled nor soft-capped.
        return_lse: also return the logarithm of the sum of exponentials of each row's scores, sink included.

    Returns:
        [B, Hq, Sq, Dv] in query's dtype; with return_lse also float32 [B, Hq, Sq]. A query that may attend
        nothing gets zeros (and its sink, or -inf without sinks), never NaN.

    Raises:
        TypeError: dtypes that are not accepted or do not go together.
        ValueError: shapes, head counts, devices or numbers that do not fit; the message names the argument.
            The values of cache_lengths and block_table are checked on the CPU; on a GPU that would stall the
            stream, and needs FASTATTN_DEBUG=1.

    Example:
        >>> import torch, fastattn
        >>> query = torch.randn(2, 8, 1, 64)
        >>> key_cache = value_cache = torch.randn(2, 2, 100, 64)
        >>> cache_lengths = torch.tensor([7, 100], dtype=torch.int32)
        >>> fastattn.ops.decode_attention(query, key_cache, value_cache, cache_lengths).shape
        torch.Size([2, 8, 1, 64])
        >>> pages = torch.randn(20, 16, 2, 64)
        >>> block_table = torch.randperm(20, dtype=torch.int32)[:14].view(2, 7)
        >>> fastattn.ops.decode_attention(query, pages, pages, cache_lengths, block_table).shape
        torch.Size([2, 8, 1, 64])
    """
    if key_cache.dtype in QUANTIZED:
        (query,) = autocast(query)
    else:
        query, key_cache, value_cache = autocast(query, key_cache, value_cache)
    cache = DecodeCache(key_cache, value_cache, cache_lengths, block_table, key_scale, value_scale)
    check_cache(query, cache)
    heads, head_dim = query.shape[1], query.shape[3]
    check_integers("decode_attention", query, "cache_lengths", cache_lengths, query.shape[0])
    check_score_terms(
        "decode_attention",
        query,
        heads,
        relative_bias=relative_bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        softcap=softcap,
    )
    window_left = _window_left(window)
    check_cache_values(cache, query.shape[2], window_left)
    terms: dict[str, Any] = dict(
        alibi_slopes=alibi_slopes,
        window_left=window_left,
        scale=head_dim**-0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
        **relative_terms(relative_bias),
    )
    lse: Tensor | None
    if runs_in_pytorch(query):
        out, lse = decode_attention_torch(query, cache, AttentionTerms(**terms))
    else:
        out, lse = _decode_attention(query, **vars(cache), **terms)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _window_left(window: int | tuple[int, int] | None) -> int:
    pair = (window, 0) if isinstance(window, (int, torch.SymInt)) else window
    left, right = check_window("decode_attention", pair)
    if right > 0:
        raise ValueError(
            f"decode_attention: window is {window!r}; no key follows a query's own: right must be 0 or -1"
        )
    return left


def _forward(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    cache, terms = _named(rest)
    if runs_in_kernel(query, cache["value_cache"]):
        from fastattn_kernels.decode import decode_attention_forward

        out, lse = decode_attention_forward(query, **cache, **terms)
        return out, lse
    out, maybe_lse = decode_attention_torch(query, DecodeCache(**cache), AttentionTerms(**terms))
    # Stored as [B, Sq, Hq, Dv], as the kernel's, so that joining the heads afterwards is free.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, query.new_empty(0, dtype=torch.float32) if maybe_lse is None else maybe_lse


def _reference(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    cache, terms = _named(rest)
    return decode_attention_reference(query, DecodeCache(**cache), AttentionTerms(**terms))


def _fake(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, *rest: Any, **named: Any
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value_cache.shape[3]).transpose(1, 2)
    lse_shape = (batch, heads, queries) if rest[-1] else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


_CACHE = (
    "Tensor key_cache, Tensor value_cache, Tensor cache_lengths, Tensor? block_table, Tensor? key_scale, "
    "Tensor? value_scale"
)
_TERMS = (
    "Tensor? rel_table, str rel_kind, int rel_max_distance, Tensor? alibi_slopes, SymInt window_left, "
    "float scale, float softcap, Tensor? sinks, bool return_lse"
)


def _named(values: tuple[Any, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The schema's arguments after query by name: those of the cache, and those that shape the scores."""
    cache, terms = ([argument.split(" ")[-1] for argument in part.split(", ")] for part in (_CACHE, _TERMS))
    count = len(cache)
    return dict(zip(cache, values[:count], strict=True)), dict(zip(terms, values[count:], strict=True))


_decode_attention = register(
    "decode_attention",
    f"Tensor query, {_CACHE}, {_TERMS}",
    "(Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    reference=_reference,
)
