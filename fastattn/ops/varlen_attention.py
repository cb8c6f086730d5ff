"""Attention over sequences packed end to end, nothing padded: contract and registration."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import runs_in_kernel
from fastattn.ops.attention_cpu import varlen_attention_torch
from fastattn.ops.attention_reference import varlen_attention_reference
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.attention_validation import check_query_start, check_score_terms, check_window, is_int
from fastattn.ops.registration import draw_seed, register, runs_in_pytorch
from fastattn.ops.relative_bias import RelativeBias, relative_terms
from fastattn.ops.validation import (
    autocast,
    check_device,
    check_dropout,
    check_same,
    may_read,
    shape_of,
    shapes_of,
)

__all__ = ["varlen_attention"]


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = False,
    query_start: int | Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`fastattn.ops.attention` over sequences packed end to end: sequence b is rows cu_seqlens[b] to
    cu_seqlens[b + 1].

    The packed layout is FlashAttention's (Dao, 2023).

    Args:
        query: [Tq, Hq, D], float16, bfloat16, float32 or float64, any strides.
        key: [Tk, Hkv, D], Hq a multiple of Hkv.
        value: [Tk, Hkv, Dv].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], from 0 to Tq and Tk, never decreasing. A sequence may be
            empty.
        max_seqlen_q, max_seqlen_k: upper bounds of the sequences' lengths; need not be the exact maxima.
        query_start: position of each sequence's query 0 among its keys, an int or an int tensor [B]; default
            the number of keys less the number of queries of each sequence.
        relative_bias, alibi_slopes, causal, window, scale, softcap, sinks, dropout_p, return_lse: as in
            `fastattn.ops.attention`, within each sequence.

    Returns:
        [Tq, Hq, Dv] in query's dtype; with return_lse also float32 [Hq, Tq]. A query that may attend nothing
        gets zeros (and its sink, or -inf without sinks).

    Raises:
        TypeError: wrong or differing dtypes, a window that is no pair of ints.
        ValueError: shapes, head counts, devices or numbers that do not fit. The values of cu_seqlens are
            checked on the CPU; on a GPU, where that stalls the stream, only under FASTATTN_DEBUG=1.

    Example:
        >>> import torch, fastattn
        >>> packed = torch.randn(5, 4, 32)
        >>> cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
        >>> fastattn.ops.varlen_attention(packed, packed, packed, cu_seqlens, cu_seqlens, 3, 3).shape
        torch.Size([5, 4, 32])
    """
    query, key, value = autocast(query, key, value)
    _check_heads(query, key, value)
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            "varlen_attention: cu_seqlens_q and cu_seqlens_k must count the same sequences; "
            f"got {shape_of(cu_seqlens_q)} and {shape_of(cu_seqlens_k)}"
        )
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, query.shape[0], "max_seqlen_q", max_seqlen_q)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, query, key.shape[0], "max_seqlen_k", max_seqlen_k)
    check_dropout("varlen_attention", dropout_p)
    check_score_terms(
        "varlen_attention",
        query,
        query.shape[1],
        relative_bias=relative_bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        softcap=softcap,
    )
    start, starts = check_query_start("varlen_attention", query, query_start, cu_seqlens_q.shape[0] - 1)
    window_left, window_right = check_window("varlen_attention", window)
    terms = AttentionTerms(
        alibi_slopes=alibi_slopes,
        causal=causal,
        query_start=0 if start is None else start,
        query_starts=starts,
        window_left=window_left,
        window_right=window_right,
        scale=query.shape[2] ** -0.5 if scale is None else scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=draw_seed(dropout_p, query.device),
        return_lse=return_lse,
        **relative_terms(relative_bias),
    )
    default_start = query_start is None
    if runs_in_pytorch(query):
        out, lse = varlen_attention_torch(query, key, value, cu_seqlens_q, cu_seqlens_k, default_start, terms)
    else:
        out, lse = _varlen_attention(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            default_start=default_start,
            **{name: getattr(terms, name) for name in _TERMS if name != "default_start"},
        )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    if not query.dim() == key.dim() == value.dim() == 3:
        raise ValueError(
            "varlen_attention: query, key and value must be [tokens, heads, head_dim]; got "
            + shapes_of(query, key, value)
        )
    check_same("varlen_attention", "query", query, "key", key)
    check_same("varlen_attention", "query", query, "value", value)
    if key.shape[:2] != value.shape[:2] or query.shape[2] != key.shape[2]:
        raise ValueError(
            "varlen_attention: key tokens, key heads and head_dim must agree; got "
            + shapes_of(query, key, value)
        )
    if query.shape[2] == 0:
        raise ValueError(f"varlen_attention: head_dim must be at least 1; got {shapes_of(query, key, value)}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(
            f"varlen_attention: {query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads; "
            f"got {shapes_of(query, key, value)}"
        )


def _check_cu_seqlens(
    name: str, cu_seqlens: Tensor, query: Tensor, tokens: int, bound_name: str, bound: int
) -> None:
    check_device("varlen_attention", "query", query, name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"varlen_attention: {name} must be an int32 tensor [sequences + 1]; "
            f"got {cu_seqlens.dtype} {shape_of(cu_seqlens)}"
        )
    if not is_int(bound) or bound < 0:
        raise ValueError(f"varlen_attention: {bound_name} is {bound!r}; it must be an int >= 0")
    if not may_read(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"varlen_attention: {name} must start at 0, never decrease and end at {tokens}, "
            f"the packed tokens; got {bounds}"
        )
    if max(lengths, default=0) > bound:
        raise ValueError(
            f"varlen_attention: {name} holds a sequence of {max(lengths)} tokens, more than its bound "
            f"{bound_name} = {bound}"
        )


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    named = dict(zip(_TERMS, rest, strict=True))
    if runs_in_kernel(query, value):
        from fastattn_kernels.attention import varlen_attention_forward

        kernel_result: tuple[Tensor, Tensor] = varlen_attention_forward(
            query=query,
            key=key,
            value=value,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            **named,
        )
        return kernel_result
    default_start = named.pop("default_start")
    out, lse = varlen_attention_torch(
        query, key, value, cu_seqlens_q, cu_seqlens_k, default_start, AttentionTerms(**named)
    )
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    lse_shape = (query.shape[1], query.shape[0]) if rest[-1] else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    named = dict(zip(_TERMS, rest, strict=True))
    default_start = named.pop("default_start")
    return varlen_attention_reference(
        query, key, value, cu_seqlens_q, cu_seqlens_k, default_start, AttentionTerms(**named)
    )


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, Tensor? rel_table, str rel_kind, int rel_max_distance, Tensor? alibi_slopes, "
    "bool causal, SymInt query_start, Tensor? query_starts, bool default_start, SymInt window_left, "
    "SymInt window_right, float scale, float softcap, Tensor? sinks, float dropout_p, Tensor? seed, "
    "bool return_lse"
)
# The names of the arguments after the sequences' bounds.
_TERMS = [argument.split(" ")[-1] for argument in _SCHEMA.split(", ")[7:]]

_varlen_attention = register(
    "varlen_attention", _SCHEMA, "(Tensor, Tensor)", forward=_forward, fake=_fake, reference=_reference
)
