"""Attention forward, dense and varlen: from validated tensors to the launches that compute it."""

from __future__ import annotations

import torch

from ._launch import architecture_of
from ._tuned import gpu_of
from .attention_plan import LOG2E, plan_attention, plan_varlen_attention
from .relative_bias_kernel import bias_by_distance

__all__ = ["attention_forward", "varlen_attention_forward"]


def attention_forward(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rel_table: torch.Tensor | None = None,
    rel_kind: str = "t5",
    rel_max_distance: int = 128,
    alibi_slopes: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    causal: bool = False,
    query_start: int = 0,
    query_starts: torch.Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of padded batches.

    Args:
        query: [B, Hq, Sq, D], float16, bfloat16 or float32, any strides; D up to 256.
        key: [B, Hkv, Sk, D]; Hq is a multiple of Hkv.
        value: [B, Hkv, Sk, Dv].
        mask: bool, True = attend: [B, Sk], or 4-D broadcastable to [B, Hq, Sq, Sk]; read in place.
        bias: float, 4-D broadcastable to [B, Hq, Sq, Sk], added to the scaled and soft-capped scores.
        rel_table: float [num_buckets, Hq], added by the bucket of key position less query position.
        rel_kind: "t5", "t5-causal" or "mpnet": how distances become buckets.
        rel_max_distance: distances from here on share the last bucket.
        alibi_slopes: float [Hq]; the score loses slope times distance.
        key_lengths: int [B]: keys at or past it are not there, and are never read.
        causal: query i sees keys j <= i + query_start.
        query_start: position of query 0 among the keys, used where `query_starts` is None.
        query_starts: int [B].
        window_left: query i sees keys j >= i + query_start - window_left; -1: any.
        window_right: query i sees keys j <= i + query_start + window_right; -1: any.
        scale: factor of the scores.
        softcap: scores become softcap * tanh(score / softcap) where it is positive.
        sinks: float [Hq]: one more logit of a head, for no value.
        dropout_p: probability that a normalised weight is dropped; needs `seed`.
        seed: int64 [1].
        return_lse: whether to return the logsumexp of the scores.

    Returns:
        out [B, Hq, Sq, Dv], a transposed view of a contiguous [B, Sq, Hq, Dv], and lse float32 [B, Hq, Sq],
        natural logarithm, or an empty tensor [0]. A query with nothing to attend gives zeros, and -inf or
        the head's sink.

    Raises:
        ValueError: a head size over 256, a dtype the kernel has no code for, or an unknown rel_kind.
    """
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries) if return_lse else (0,), dtype=torch.float32)
    if out.numel() or lse.numel():
        plan_attention(
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse if return_lse else None,
            mask=mask,
            bias=bias,
            distance_bias=_distance_bias(rel_table, rel_kind, rel_max_distance, bias),
            alibi_slopes=alibi_slopes,
            key_lengths=key_lengths,
            causal=causal,
            query_start=query_start,
            query_starts=query_starts,
            window_left=window_left,
            window_right=window_right,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            seed=seed,
            architecture=architecture_of(query.device),
            gpu=gpu_of(query.device),
        ).run(query.device)
    return out, lse


def varlen_attention_forward(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    rel_table: torch.Tensor | None = None,
    rel_kind: str = "t5",
    rel_max_distance: int = 128,
    alibi_slopes: torch.Tensor | None = None,
    causal: bool = False,
    query_start: int = 0,
    query_starts: torch.Tensor | None = None,
    default_start: bool = True,
    window_left: int = -1,
    window_right: int = -1,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    return_lse: bool = False,
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
        ValueError: a head size over 256, a dtype the kernel has no code for, or an unknown rel_kind.
    """
    tokens, heads, _ = query.shape
    out = query.new_empty(tokens, heads, value.shape[2])
    lse = query.new_empty((heads, tokens) if return_lse else (0,), dtype=torch.float32)
    if (out.numel() or lse.numel()) and cu_seqlens_q.numel() > 1:
        plan_varlen_attention(
            query=query,
            key=key,
            value=value,
            out=out,
            lse=lse if return_lse else None,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            distance_bias=_distance_bias(rel_table, rel_kind, rel_max_distance, None),
            alibi_slopes=alibi_slopes,
            causal=causal,
            query_start=query_start,
            query_starts=query_starts,
            default_start=default_start,
            window_left=window_left,
            window_right=window_right,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            dropout_p=dropout_p,
            seed=seed,
            architecture=architecture_of(query.device),
            gpu=gpu_of(query.device),
        ).run(query.device)
    return out, lse


def _distance_bias(
    rel_table: torch.Tensor | None, rel_kind: str, rel_max_distance: int, bias: torch.Tensor | None
) -> torch.Tensor | None:
    if rel_table is None:
        return None
    # In the base the kernel's scores are in.
    return bias_by_distance(rel_table, rel_kind, rel_max_distance, LOG2E if bias is None else 1.0)
