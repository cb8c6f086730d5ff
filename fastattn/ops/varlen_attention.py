"""Attention over sequences packed end to end, nothing padded: contract and registration."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.attention import runs_in_kernel
from fastattn.ops.attention_cpu import varlen_attention_torch
from fastattn.ops.attention_reference import varlen_attention_reference
from fastattn.ops.registration import draw_seed, register, runs_in_pytorch
from fastattn.ops.validation import (
    autocast,
    check_device,
    check_dropout,
    check_same,
    is_traced,
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
    causal: bool = False,
    query_start: int | Tensor | None = None,
    scale: float | None = None,
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
        causal: query i of a sequence sees its keys j <= i + query_start.
        query_start: int or int tensor [B]; default the number of keys less the number of queries of each
            sequence.
        scale: default D ** -0.5.
        dropout_p: probability of dropping an attention weight, in [0, 1].
        return_lse: also return the logsumexp of each row.

    Returns:
        [Tq, Hq, Dv] in query's dtype; with return_lse also float32 [Hq, Tq]. A query with no keys gets zeros
        (and -inf).

    Raises:
        TypeError: wrong or differing dtypes.
        ValueError: shapes, head counts or devices that do not fit. The values of cu_seqlens are checked on
            the CPU; on a GPU that would stall the stream.

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
    _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, query, max_seqlen_q)
    _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, key, max_seqlen_k)
    check_dropout("varlen_attention", dropout_p)
    starts = query_start if isinstance(query_start, Tensor) else None
    if starts is not None and (
        starts.dtype not in (torch.int32, torch.int64) or starts.shape[0] != cu_seqlens_q.shape[0] - 1
    ):
        raise ValueError(
            f"varlen_attention: query_start must be an int or an int tensor [{cu_seqlens_q.shape[0] - 1}]; "
            f"got {starts.dtype} {shape_of(starts)}"
        )
    attend: Callable[..., Any] = varlen_attention_torch if runs_in_pytorch(query) else _varlen_attention
    out, lse = attend(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal,
        0 if query_start is None or starts is not None else query_start,
        starts,
        query_start is None,
        query.shape[2] ** -0.5 if scale is None else scale,
        dropout_p,
        draw_seed(dropout_p, query.device),
        return_lse,
    )
    return (out, lse) if return_lse else out


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
    if key.shape[1] == 0 or query.shape[1] % key.shape[1] != 0:
        raise ValueError(
            f"varlen_attention: {query.shape[1]} query heads are not a multiple of {key.shape[1]} key heads; "
            f"got {shapes_of(query, key, value)}"
        )


def _check_cu_seqlens(name: str, cu_seqlens: Tensor, packed: Tensor, max_seqlen: int) -> None:
    check_device("varlen_attention", "query", packed, name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"varlen_attention: {name} must be an int32 tensor [sequences + 1]; "
            f"got {cu_seqlens.dtype} {shape_of(cu_seqlens)}"
        )
    if cu_seqlens.device.type != "cpu" or is_traced(cu_seqlens):
        return
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != packed.shape[0] or min(lengths, default=0) < 0:
        raise ValueError(
            f"varlen_attention: {name} must start at 0, never decrease and end at {packed.shape[0]}, "
            f"the packed tokens; got {bounds}"
        )
    if max(lengths, default=0) > max_seqlen:
        raise ValueError(
            f"varlen_attention: {name} holds a sequence of {max(lengths)} tokens, "
            f"more than its bound {max_seqlen}"
        )


def _forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if runs_in_kernel(query, value):
        from fastattn_kernels.attention import varlen_attention_forward

        kernel_result: tuple[Tensor, Tensor] = varlen_attention_forward(query, key, value, *rest)
        return kernel_result
    out, lse = varlen_attention_torch(query, key, value, *rest)
    return out, query.new_empty(0, dtype=torch.float32) if lse is None else lse


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    lse_shape = (query.shape[1], query.shape[0]) if rest[-1] else (0,)
    return out, query.new_empty(lse_shape, dtype=torch.float32)


_varlen_attention = register(
    "varlen_attention",
    "Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, bool causal, SymInt query_start, Tensor? query_starts, bool default_start, "
    "float scale, float dropout_p, Tensor? seed, bool return_lse",
    "(Tensor, Tensor)",
    forward=_forward,
    fake=_fake,
    reference=varlen_attention_reference,
)
