"""Scaled dot-product attention over [batch, heads, length, head_dim]: contract and registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastattn.backend import backend_for
from fastattn.ops.attention_cpu import attention_torch
from fastattn.ops.attention_reference import attention_reference
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.attention_validation import (
    check_integers,
    check_query_start,
    check_score_terms,
    check_window,
)
from fastattn.ops.registration import draw_seed, register, runs_in_pytorch
from fastattn.ops.relative_bias import RelativeBias, relative_terms
from fastattn.ops.validation import autocast, check_device, check_dropout, check_same, shape_of, shapes_of

__all__ = ["attention"]

# The kernels' tiles hold one head of up to this size.
MAX_KERNEL_HEAD_DIM = 256


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    relative_bias: RelativeBias | None = None,
    alibi_slopes: Tensor | None = None,
    causal: bool = False,
    query_start: int | Tensor | None = None,
    key_lengths: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every query over the keys it may see: softmax(scale * Q K^T + bias) V.

    Vaswani et al., "Attention Is All You Need" (2017), equation 1; on a GPU computed without the score
    matrix, as in Dao, "FlashAttention-2" (2023). Scores and softmax accumulate in float32. The position of
    query i among the keys is p = i + query_start, for causality, window, relative bias and ALiBi alike.

    Args:
        query: [B, Hq, Sq, D], float16, bfloat16, float32 or float64, any strides; D up to 256 on a GPU.
        key: [B, Hkv, Sk, D], Hq a multiple of Hkv.
        value: [B, Hkv, Sk, Dv].
        mask: bool, True = attend: [B, Sk], or 4-D broadcastable to [B, Hq, Sq, Sk].
        bias: float, added to the scaled and soft-capped scores: 4-D broadcastable to [B, Hq, Sq, Sk]. -inf
            hides a key.
        relative_bias: added likewise: the value its table holds for the bucket of j - p (T5, MPNet).
        alibi_slopes: float [Hq]: -slope * |p - j| is added likewise (Press et al., "Train Short, Test Long",
            2022; under causality theirs up to a constant of the row, which softmax ignores).
        causal: query i sees keys j <= p.
        query_start: position of query 0 among the keys, an int or an int tensor [B]. Default Sk - Sq, which
            aligns the last query with the last key; SDPA's is_causal instead means 0.
        key_lengths: int tensor [B]: keys at or past it are not there, whatever their rows hold.
        window: (left, right): query i sees keys p - left <= j <= p + right; -1 = unbounded.
        scale: default D ** -0.5.
        softcap: c > 0 bounds the scaled scores s to c * tanh(s / c) (Gemma 2); 0 = none.
        sinks: float [Hq]: one more logit a head in the softmax's denominator, neither scaled nor soft-capped
            (gpt-oss).
        dropout_p: probability of dropping an attention weight, in [0, 1]; the seed comes from PyTorch's
            generator.
        return_lse: also return the logarithm of the sum of exponentials of each row's scores, sink included.

    Returns:
        [B, Hq, Sq, Dv] in query's dtype; with return_lse also float32 [B, Hq, Sq]. A query that may attend
        nothing gets zeros (and its sink, or -inf without sinks), never NaN.

    Raises:
        TypeError: wrong or differing dtypes, a window that is no pair of ints.
        ValueError: shapes, head counts, devices or numbers that do not fit; the message names the argument.

    Example:
        >>> import torch, fastattn
        >>> query = torch.randn(2, 8, 5, 64)
        >>> key = value = torch.randn(2, 2, 7, 64)
        >>> fastattn.ops.attention(query, key, value, causal=True, window=(3, 0)).shape
        torch.Size([2, 8, 5, 64])
    """
    query, key, value = autocast(query, key, value)
    _check_heads(query, key, value)
    batch, heads, length, head_dim = query.shape
    keys = key.shape[2]
    broadcastable = (batch, heads, length, keys)
    if mask is not None:
        _check_mask(mask, query, broadcastable)
    if bias is not None:
        if not bias.is_floating_point():
            raise TypeError(
                f"attention: bias is {bias.dtype}; it must be floating point (a bool goes to mask)"
            )
        _check_broadcast("bias", bias, query, broadcastable)
    if key_lengths is not None:
        check_integers("attention", query, "key_lengths", key_lengths, batch)
    check_dropout("attention", dropout_p)
    check_score_terms(
        "attention",
        query,
        heads,
        relative_bias=relative_bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        scale=scale,
        softcap=softcap,
    )
    start, starts = check_query_start("attention", query, query_start, batch)
    window_left, window_right = check_window("attention", window)
    terms = AttentionTerms(
        mask=mask,
        bias=bias,
        key_lengths=key_lengths,
        causal=causal,
        query_start=keys - length if start is None else start,
        query_starts=starts,
        window_left=window_left,
        window_right=window_right,
        scale=head_dim**-0.5 if scale is None else scale,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
        seed=draw_seed(dropout_p, query.device),
        return_lse=return_lse,
        **relative_terms(relative_bias),
    )
    if runs_in_pytorch(query):
        out, lse = attention_torch(query, key, value, terms)
    else:
        out, lse = _attention(query, key, value, **vars(terms))
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    q, k, v = query.shape, key.shape, value.shape
    if not len(q) == len(k) == len(v) == 4:
        raise ValueError(
            "attention: query, key and value must be [batch, heads, length, head_dim]; got "
            + shapes_of(query, key, value)
        )
    check_same("attention", "query", query, "key", key)
    check_same("attention", "query", query, "value", value)
    if q[0] != k[0] or k[:3] != v[:3]:
        raise ValueError(
            f"attention: batch, key heads and key length must agree; got {shapes_of(query, key, value)}"
        )
    if q[3] != k[3]:
        raise ValueError(
            f"attention: query and key must have the same head_dim; got {shapes_of(query, key, value)}"
        )
    if q[3] == 0:
        raise ValueError(f"attention: head_dim must be at least 1; got {shapes_of(query, key, value)}")
    if k[1] == 0 or q[1] % k[1] != 0:
        raise ValueError(
            f"attention: {q[1]} query heads are not a multiple of {k[1]} key heads; "
            f"got {shapes_of(query, key, value)}"
        )


def _check_mask(mask: Tensor, query: Tensor, broadcastable: tuple[int, ...]) -> None:
    if mask.dtype != torch.bool:
        raise TypeError(
            f"attention: mask is {mask.dtype}; it must be bool, True = attend (a float goes to bias)"
        )
    if mask.dim() == 2:
        expected = (broadcastable[0], broadcastable[3])
        check_device("attention", "query", query, "mask", mask)
        if mask.shape != expected:
            raise ValueError(
                f"attention: a 2-D mask must be [batch, key length] = {list(expected)}; got {shape_of(mask)}"
            )
    else:
        _check_broadcast("mask", mask, query, broadcastable)


def _check_broadcast(name: str, x: Tensor, query: Tensor, broadcastable: tuple[int, ...]) -> None:
    check_device("attention", "query", query, name, x)
    if x.dim() != 4 or any(
        given != 1 and given != full for given, full in zip(x.shape, broadcastable, strict=True)
    ):
        raise ValueError(
            f"attention: {name} must be 4-D and broadcastable to [batch, heads, query length, key length] = "
            f"{list(broadcastable)}; got {shape_of(x)}"
        )


def runs_in_kernel(query: Tensor, value: Tensor) -> bool:
    """Whether the Triton kernel computes this: the backend, the dtype and both head sizes allow it."""
    return (
        backend_for(query.device) == "triton"
        and query.dtype != torch.float64
        and max(query.shape[-1], value.shape[-1]) <= MAX_KERNEL_HEAD_DIM
    )


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    named = dict(zip(_TERMS, rest, strict=True))
    if runs_in_kernel(query, value):
        from fastattn_kernels.attention import attention_forward

        kernel_out, kernel_lse = attention_forward(query=query, key=key, value=value, **named)
        return _length_major(kernel_out), kernel_lse
    out, lse = attention_torch(query, key, value, AttentionTerms(**named))
    return _length_major(out), query.new_empty(0, dtype=torch.float32) if lse is None else lse


def _length_major(out: Tensor) -> Tensor:
    """[B, H, S, D] stored as [B, S, H, D], so that joining the heads afterwards is free."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = query.new_empty(batch, length, heads, value.shape[3]).transpose(1, 2)
    lse_shape = (batch, heads, length) if rest[-1] else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


def _reference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return attention_reference(query, key, value, AttentionTerms(**dict(zip(_TERMS, rest, strict=True))))


_SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor? mask, Tensor? bias, Tensor? rel_table, str rel_kind, "
    "int rel_max_distance, Tensor? alibi_slopes, Tensor? key_lengths, bool causal, SymInt query_start, "
    "Tensor? query_starts, SymInt window_left, SymInt window_right, float scale, float softcap, "
    "Tensor? sinks, float dropout_p, Tensor? seed, bool return_lse"
)
# The names of the arguments after query, key and value.
_TERMS = [argument.split(" ")[-1] for argument in _SCHEMA.split(", ")[3:]]

_attention = register(
    "attention", _SCHEMA, "(Tensor, Tensor)", forward=_forward, fake=_fake, reference=_reference
)
