"""The launch of the attention kernel for given tensors: sizes, strides, tiles and grid."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._dropout import dropout_constants
from ._launch import Launch, power_of_two
from .attention_config import MAX_HEAD_DIM, choose_attention_config, max_registers
from .attention_kernel import attention_kernel
from .relative_bias_kernel import MARGIN

__all__ = ["LOG2E", "plan_attention", "plan_varlen_attention"]

LOG2E = 1.4426950408889634
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Positions beyond it see and are seen as at it (the kernel's FAR); a window of half of it sees everything.
FAR = 2**29


def plan_attention(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    architecture: str,
    mask: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    **terms: Any,
) -> Launch:
    """The launch of `attention_forward` on `architecture`, into `out` and, where given, `lse`.

    `terms` are `_plan`'s: what dense and varlen share.
    """
    batch, heads, queries, _ = query.shape
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    arguments = dict(
        mask=mask,
        key_lengths=None if key_lengths is None else key_lengths.contiguous(),
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        query_heads=heads,
        group_size=heads // key.shape[1],
        max_queries=queries,
        max_keys=key.shape[2],
        stride_lb=heads * queries,
        stride_lh=queries,
        VARLEN=False,
        DEFAULT_START=False,
    )
    strides = query.stride(), key.stride(), value.stride(), out.stride()
    return _plan((query, key, value, out, lse), strides, arguments, batch, architecture, **terms)


def plan_varlen_attention(
    *,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    architecture: str,
    default_start: bool = True,
    **terms: Any,
) -> Launch:
    """The launch of `varlen_attention_forward` on `architecture`, into `out` and, where given, `lse`."""
    heads = query.shape[1]
    arguments = dict(
        mask=None,
        key_lengths=None,
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        query_heads=heads,
        group_size=heads // key.shape[1],
        max_queries=min(max_seqlen_q, query.shape[0]),
        max_keys=max_seqlen_k,
        stride_lb=0,
        stride_lh=query.shape[0],
        VARLEN=True,
        DEFAULT_START=default_start,
    )
    # [T, H, D] is [1, H, T, D] whose batches begin where cu_seqlens says.
    strides = tuple((0, x.stride(1), x.stride(0), x.stride(2)) for x in (query, key, value, out))
    batch = cu_seqlens_q.numel() - 1
    return _plan((query, key, value, out, lse), strides, arguments, batch, architecture, **terms)


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


def _aligned(scores: torch.Tensor | None, per_query: bool) -> bool:
    """Whether the kernel reads a mask or bias by whole vectors."""
    if scores is None or not per_query:
        return True
    return scores.stride(3) == 1 and scores.stride(2) % 16 == 0 and scores.data_ptr() % 16 == 0


def _plan(
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    strides: tuple[tuple[int, ...], ...],
    arguments: dict[str, Any],
    batch: int,
    architecture: str,
    *,
    scale: float,
    bias: torch.Tensor | None = None,
    distance_bias: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    causal: bool = False,
    query_start: int = 0,
    query_starts: torch.Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    seed: torch.Tensor | None = None,
    gpu: str | None = None,
) -> Launch:
    """What dense and varlen share.

    Args:
        tensors: query, key, value, out and lse.
        strides: those of query, key, value and out, as [B, H, S, D].
        arguments: the kernel's that differ between dense and varlen.
        batch: number of sequences.
        architecture: as `architecture_of` names it.
        distance_bias: what `bias_by_distance` gives, times LOG2E if there is no bias.
        gpu: whose measured choices to ask, as `gpu_of` names it.
    """
    query, key, value, out, lse = tensors
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        raise ValueError(
            f"head sizes are {head_dim} and {value_dim}; the kernel takes at most {MAX_HEAD_DIM}"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"dtype is {query.dtype}; the kernel takes float16, bfloat16 and float32")
    if causal:
        window_right = 0
    has_left, has_right = 0 <= window_left < FAR // 2, 0 <= window_right < FAR // 2
    by_distance = distance_bias is not None or alibi_slopes is not None
    by_position = by_distance or has_left or has_right
    if not by_position or arguments["DEFAULT_START"]:
        query_starts = None
    block_d, block_dv = power_of_two(head_dim, least=16), power_of_two(value_dim, least=16)
    dropout = seed is not None and dropout_p > 0.0
    strides = (*strides, _broadcast(arguments["mask"]), _broadcast(bias))
    mask_per_query, bias_per_query = strides[4][2] != 0, strides[5][2] != 0
    # What is loaded beside the scores, and how: see `choose_attention_config`.
    loaded = mask_per_query + bias_per_query + (distance_bias is not None)
    crowded = int(loaded > 0 or arguments["mask"] is not None or alibi_slopes is not None or dropout)
    if loaded > 1 or not (_aligned(arguments["mask"], mask_per_query) and _aligned(bias, bias_per_query)):
        crowded = 2
    config = choose_attention_config(
        max(block_d, block_dv),
        query.dtype,
        architecture,
        power_of_two(arguments["max_queries"], least=16),
        crowded=crowded,
        # Packed sequences end in the middle of a tensor, where a descriptor gives the next one's rows.
        describable=not arguments["VARLEN"] and all(map(_describable, (query, key, value))),
        gpu=gpu,
    )
    if config.descriptors:
        query = _described(query, config.block_m, block_d)
        key = _described(key, config.block_n, block_d)
        value = _described(value, config.block_n, block_dv)
    # Within a tile offsets take 32 bits (cheaper, and what AMD's buffer loads need) wherever they fit.
    reach = max(max(row) for row in (tensor[2:] for tensor in strides))
    wide = reach * (config.block_m + config.block_n + block_d + block_dv) >= 2**31
    threshold, keep_scale = dropout_constants(dropout_p)
    # Scores are in base 2, the factor folded into what scales them, but with a bias: its largest values
    # the factor would overflow.
    to_base = LOG2E if bias is None else 1.0
    capped = softcap > 0.0
    plain = not capped and bias is None and not by_distance
    arguments.update(
        zip(STRIDES, chain.from_iterable(strides), strict=True),
        query=query,
        key=key,
        value=value,
        out=out,
        lse=lse,
        bias=bias,
        distance_bias=distance_bias,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        query_starts=None if query_starts is None else query_starts.contiguous(),
        seed=seed if dropout else None,
        query_start=min(max(query_start, -FAR), FAR) if by_position else 0,
        window_left=window_left if has_left else 0,
        window_right=window_right if has_right else 0,
        reach=0 if distance_bias is None else distance_bias.shape[1] // 2 - MARGIN,
        stride_dh=0 if distance_bias is None else distance_bias.shape[1],
        score_scale=scale / softcap if capped else scale * to_base,
        softcap=softcap * to_base,
        threshold=threshold,
        keep_scale=keep_scale,
        stride_ah=0 if alibi_slopes is None else alibi_slopes.stride(0),
        stride_sh=0 if sinks is None else sinks.stride(0),
        HAS_LEFT=has_left,
        HAS_RIGHT=has_right,
        HAS_SOFTCAP=capped,
        SCALE_LATE=plain and scale > 0.0,
        DESCRIBED=config.descriptors,
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
    registers = max_registers(architecture, config.num_warps)
    return Launch(attention_kernel, programs, arguments, config.num_warps, config.num_stages, registers)


def _describable(x: torch.Tensor) -> bool:
    """Whether a tensor descriptor can describe `x`: contiguous rows, all else in whole 16 bytes."""
    aligned = 16 // x.element_size()
    return (
        x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(
            size == 1 or (stride > 0 and stride % aligned == 0)
            for size, stride in zip(x.shape[:3], x.stride(), strict=False)
        )
        and x.numel() > 0
    )


def _described(x: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """`x` [B, H, S, D] for loads of [rows, columns] of one head."""
    # The stride of a dimension of one element means nothing to PyTorch, but has to be in whole 16 bytes.
    strides = [16 if size == 1 else stride for size, stride in zip(x.shape[:3], x.stride(), strict=False)]
    return TensorDescriptor(x, list(x.shape), [*strides, 1], [1, 1, rows, columns])
