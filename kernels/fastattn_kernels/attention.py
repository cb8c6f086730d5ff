"""Attention forward, dense and varlen: from validated tensors to one launch of the attention kernel."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl

from ._dropout import dropout_constants
from ._launch import Launch, architecture_of
from .attention_config import MAX_HEAD_DIM, choose_attention_config
from .attention_kernel import attention_kernel

__all__ = ["attention_forward", "plan_attention", "plan_varlen_attention", "varlen_attention_forward"]

LOG2E = 1.4426950408889634
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    causal: bool,
    query_start: int,
    query_starts: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of padded batches.

    Args:
        query: [B, Hq, Sq, D], float16, bfloat16 or float32, any strides; D up to 256.
        key: [B, Hkv, Sk, D]; Hq is a multiple of Hkv.
        value: [B, Hkv, Sk, Dv].
        mask: bool, True = attend: [B, Sk], or 4-D broadcastable to [B, Hq, Sq, Sk]; read in place.
        bias: float, 4-D broadcastable to [B, Hq, Sq, Sk], added to the scaled scores.
        key_lengths: int [B]: keys at or past it are not there, and are never read.
        causal: query i sees keys j <= i + query_start.
        query_start: used where `query_starts` is None.
        query_starts: int [B].
        scale: factor of the scores.
        dropout_p: probability that a normalised weight is dropped; needs `seed`.
        seed: int64 [1].
        return_lse: whether to return the logsumexp of the scores.

    Returns:
        out [B, Hq, Sq, Dv], a transposed view of a contiguous [B, Sq, Hq, Dv], and lse float32 [B, Hq, Sq],
        natural logarithm, or an empty tensor [0]. A query with nothing to attend gives zeros and -inf.

    Raises:
        ValueError: a head size over 256, or a dtype the kernel has no code for.
    """
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries) if return_lse else (0,), dtype=torch.float32)
    if out.numel() or lse.numel():
        launch = plan_attention(
            query, key, value, out, lse if return_lse else None, mask, bias, key_lengths, causal, query_start,
            query_starts, scale, dropout_p, seed, architecture_of(query.device),
        )  # fmt: skip
        launch.run(query.device)
    return out, lse


def varlen_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    query_start: int,
    query_starts: torch.Tensor | None,
    default_start: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of packed sequences; arguments not named here are `attention_forward`'s.

    Args:
        query: [Tq, Hq, D], the sequences one after another.
        key: [Tk, Hkv, D].
        value: [Tk, Hkv, Dv].
        cu_seqlens_q: int32 [B + 1], where each sequence begins; a sequence may be empty.
        cu_seqlens_k: int32 [B + 1].
        max_seqlen_q: an upper bound on the queries of a sequence.
        max_seqlen_k: an upper bound on the keys of a sequence.
        query_starts: int [B].
        default_start: each sequence's query_start is its keys less its queries, whatever the two above say.

    Returns:
        out [Tq, Hq, Dv], contiguous, and lse float32 [Hq, Tq] or an empty tensor [0].

    Raises:
        ValueError: a head size over 256, or a dtype the kernel has no code for.
    """
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[2])
    lse = query.new_empty((heads, tokens) if return_lse else (0,), dtype=torch.float32)
    if (out.numel() or lse.numel()) and cu_seqlens_q.numel() > 1:
        launch = plan_varlen_attention(
            query, key, value, out, lse if return_lse else None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
            max_seqlen_k, causal, query_start, query_starts, default_start, scale, dropout_p, seed,
            architecture_of(query.device),
        )  # fmt: skip
        launch.run(query.device)
    return out, lse


def plan_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    mask: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_lengths: torch.Tensor | None,
    causal: bool,
    query_start: int,
    query_starts: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    architecture: str,
) -> Launch:
    """The launch of `attention_forward` on `architecture`, into `out` and, where given, `lse`."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    arguments = dict(
        mask=mask,
        bias=bias,
        key_lengths=None if key_lengths is None else key_lengths.contiguous(),
        query_starts=query_starts.contiguous() if causal and query_starts is not None else None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        query_heads=heads,
        group_size=heads // key.shape[1],
        max_queries=queries,
        max_keys=keys,
        # A start beyond these bounds changes nothing, but would compile a second kernel for its 64 bits.
        query_start=min(max(query_start, -queries), keys),
        stride_lb=heads * queries,
        stride_lh=queries,
        VARLEN=False,
        CAUSAL=causal,
        DEFAULT_START=False,
    )
    strides = (query.stride(), key.stride(), value.stride(), out.stride(), _broadcast(mask), _broadcast(bias))
    return _plan(query, key, value, out, lse, arguments, strides, batch, scale, dropout_p, seed, architecture)


def plan_varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    query_start: int,
    query_starts: torch.Tensor | None,
    default_start: bool,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    architecture: str,
) -> Launch:
    """The launch of `varlen_attention_forward` on `architecture`, into `out` and, where given, `lse`."""
    heads = query.shape[1]
    arguments = dict(
        mask=None,
        bias=None,
        key_lengths=None,
        query_starts=query_starts.contiguous()
        if causal and not default_start and query_starts is not None
        else None,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        query_heads=heads,
        group_size=heads // key.shape[1],
        max_queries=min(max_seqlen_q, query.shape[0]),
        max_keys=max_seqlen_k,
        query_start=min(max(query_start, -max_seqlen_q), max_seqlen_k),
        stride_lb=0,
        stride_lh=query.shape[0],
        VARLEN=True,
        CAUSAL=causal,
        DEFAULT_START=default_start,
    )
    # [T, H, D] is [1, H, T, D] whose batches begin where cu_seqlens says.
    q, k, v, o = ((0, x.stride(1), x.stride(0), x.stride(2)) for x in (query, key, value, out))
    strides = (q, k, v, o, _broadcast(None), _broadcast(None))
    batch = cu_seqlens_q.numel() - 1
    return _plan(query, key, value, out, lse, arguments, strides, batch, scale, dropout_p, seed, architecture)


STRIDES = tuple(
    f"stride_{tensor}{axis}"
    for tensor, axes in {"q": "bhmd", "k": "bhnd", "v": "bhnd", "o": "bhmd", "m": "bhmn", "b": "bhmn"}.items()
    for axis in axes
)


def _broadcast(scores: torch.Tensor | None) -> tuple[int, ...]:
    """Strides of a 4-D mask or bias, 0 along the axes it is broadcast over."""
    if scores is None:
        return (0, 0, 0, 0)
    return tuple(
        0 if size == 1 else stride for size, stride in zip(scores.shape, scores.stride(), strict=True)
    )


def _plan(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    arguments: dict[str, Any],
    strides: tuple[tuple[int, ...], ...],
    batch: int,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    architecture: str,
) -> Launch:
    """What dense and varlen share: sizes, tiles and grid. `strides`: of q, k, v, out, mask and bias."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        raise ValueError(
            f"head sizes are {head_dim} and {value_dim}; the kernel takes at most {MAX_HEAD_DIM}"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"dtype is {query.dtype}; the kernel takes float16, bfloat16 and float32")
    block_d, block_dv = _block_of(head_dim), _block_of(value_dim)
    dropout = seed is not None and dropout_p > 0.0
    mask_per_query, bias_per_query = strides[4][2] != 0, strides[5][2] != 0
    config = choose_attention_config(
        max(block_d, block_dv),
        query.dtype,
        architecture,
        _block_of(arguments["max_queries"]),
        crowded=mask_per_query or bias_per_query or dropout,
    )
    # Within a tile offsets take 32 bits (cheaper, and what AMD's buffer loads need) wherever they fit.
    reach = max(max(row) for row in (tensor[2:] for tensor in strides))
    wide = reach * (config.block_m + config.block_n + block_d + block_dv) >= 2**31
    threshold, keep_scale = dropout_constants(dropout_p)
    arguments.update(
        zip(STRIDES, chain.from_iterable(strides), strict=True),
        query=query,
        key=key,
        value=value,
        out=out,
        lse=lse,
        seed=seed if dropout else None,
        # Scores are in base 2, the scale folded in, but with a bias, whose largest values the factor would
        # overflow.
        score_scale=scale if arguments["bias"] is not None else scale * LOG2E,
        threshold=threshold,
        keep_scale=keep_scale,
        MASK_PER_QUERY=mask_per_query,
        BIAS_PER_QUERY=bias_per_query,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        INDEX=tl.int64 if wide else tl.int32,
    )
    programs = triton.cdiv(arguments["max_queries"], config.block_m) * arguments["query_heads"] * batch
    return Launch(attention_kernel, programs, arguments, config.num_warps, config.num_stages)


def _block_of(size: int) -> int:
    """The power of two, at least a dot's 16, that holds `size`."""
    return max(16, 1 << max(size - 1, 0).bit_length())
