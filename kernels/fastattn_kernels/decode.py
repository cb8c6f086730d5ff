"""Decode attention: from validated tensors to the launches of the split kernel and of its reduction."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ._launch import Launch, architecture_of, power_of_two
from ._tuned import gpu_of
from .decode_config import DecodeConfig, choose_decode_config, choose_num_splits
from .decode_kernel import decode_kernel
from .decode_reduction import decode_reduction_kernel
from .relative_bias import bucket_thresholds, directional_buckets

__all__ = ["decode_attention_forward", "plan_decode_attention"]

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Parts the reduction takes at a time.
BLOCK_S = 16


def decode_attention_forward(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    cache_lengths: torch.Tensor,
    block_table: torch.Tensor | None = None,
    *,
    return_lse: bool = False,
    **arguments: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last few tokens of each sequence over its cache.

    Nothing here waits for the device: how the keys are split follows from shapes.

    Args:
        query: [B, Hq, Sq, D], float16, bfloat16 or float32, any strides; D up to 256.
        key_cache: [B, Hkv, S, D], or paged [blocks, block_size, Hkv, D]; query's dtype, int8 or
            float8_e4m3fn.
        value_cache: the same with Dv for D.
        cache_lengths: int [B]: keys of each sequence, the Sq new ones included.
        block_table: int [B, n], the pages of each sequence in order, or None for a contiguous cache. Entries
            past the length, or before the window, are never followed.
        return_lse: whether to return the logsumexp of the scores.
        arguments: the others of `plan_decode_attention`.

    Returns:
        out [B, Hq, Sq, Dv], a transposed view of a contiguous [B, Sq, Hq, Dv], and lse float32 [B, Hq, Sq],
        natural logarithm, or an empty tensor [0].

    Raises:
        ValueError: a head size over 256, or a dtype the kernel has no code for.
    """
    batch, heads, queries, _ = query.shape
    out = query.new_empty(batch, queries, heads, value_cache.shape[3]).transpose(1, 2)
    lse = query.new_empty((batch, heads, queries) if return_lse else (0,), dtype=torch.float32)
    if out.numel() or lse.numel():
        launches = plan_decode_attention(
            query,
            key_cache,
            value_cache,
            out,
            lse if return_lse else None,
            cache_lengths,
            block_table,
            **arguments,
            architecture=architecture_of(query.device),
            gpu=gpu_of(query.device),
        )
        for launch in launches:
            launch.run(query.device)
    return out, lse


def plan_decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    cache_lengths: torch.Tensor,
    block_table: torch.Tensor | None = None,
    *,
    key_scale: torch.Tensor | None = None,
    value_scale: torch.Tensor | None = None,
    rel_table: torch.Tensor | None = None,
    rel_kind: str = "t5",
    rel_max_distance: int = 0,
    alibi_slopes: torch.Tensor | None = None,
    window_left: int = -1,
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    architecture: str,
    gpu: str | None = None,
    config: DecodeConfig | None = None,
    num_splits: int | None = None,
) -> tuple[Launch, ...]:
    """The launches, in order, into `out` and, where given, `lse`: the kernel's, and the reduction's if split.

    Args:
        key_scale: float32 [Hkv], with int8 and fp8 caches: keys are the cache times it.
        value_scale: float32 [Hkv], likewise.
        rel_table: [num_buckets, Hq]; the bias of a key's bucket of distances is added to the scores.
        rel_kind: "t5", "t5-causal" or "mpnet".
        rel_max_distance: distances from here on share the last bucket.
        alibi_slopes: float [Hq]; a slope times the distance is subtracted from the scores.
        window_left: a query sees so many keys before its own; -1 is all.
        scale: factor of the scores.
        softcap: scores are softcap * tanh(scores / softcap) where it is positive.
        sinks: float [Hq], one more logit of each head, in the denominator only.
        architecture: as `architecture_of` names it.
        gpu: as `gpu_of` names it.
        config, num_splits: in place of the choices made for this GPU.
    """
    batch, heads, queries, head_dim = query.shape
    value_dim = value_cache.shape[3]
    if max(head_dim, value_dim) > MAX_HEAD_DIM:
        raise ValueError(
            f"head sizes are {head_dim} and {value_dim}; the kernel takes at most {MAX_HEAD_DIM}"
        )
    if query.dtype not in DTYPES:
        raise ValueError(f"dtype is {query.dtype}; the kernel takes float16, bfloat16 and float32")
    page_size = 0
    max_keys = key_cache.shape[2]
    if block_table is not None:
        page_size = key_cache.shape[1]
        max_keys = block_table.shape[1] * page_size
        # [blocks, block_size, Hkv, D] is [B, Hkv, S, D] whose batches are pages.
        key_cache, value_cache = key_cache.transpose(1, 2), value_cache.transpose(1, 2)
    key_heads = key_cache.shape[1]
    group_size = heads // key_heads
    block_d, block_dv = power_of_two(head_dim, least=16), power_of_two(value_dim, least=16)
    if config is None:
        config = choose_decode_config(
            max(block_d, block_dv),
            query.dtype,
            key_cache.dtype,
            page_size > 0,
            architecture,
            queries * group_size,
            gpu,
        )
    programs = triton.cdiv(queries * group_size, config.block_m) * key_heads * batch
    if num_splits is None:
        num_splits = choose_num_splits(programs, max_keys, config, architecture)
    split = num_splits > 1
    fp8 = None
    if key_cache.dtype == torch.float8_e4m3fn:
        # As bytes: Triton has no zero of the type to fill masked places with, and refuses it below sm_89.
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
        fp8 = _fp8_conversion(architecture)

    rows = batch * heads * queries
    parts, part_lse, part_stride = out, lse, 0
    if split:
        parts = torch.empty(
            num_splits, batch, heads, queries, value_dim, dtype=torch.float32, device=query.device
        )
        part_lse = torch.empty(num_splits, rows, dtype=torch.float32, device=query.device)
        part_stride = rows * value_dim
    # What both kernels need to tell which splits have keys.
    shared = dict(
        cache_lengths=cache_lengths.contiguous(),
        # A window beyond the cache is one as long, and stays within 32 bits.
        window_left=min(window_left, max_keys),
        WINDOW=window_left >= 0,
        queries=queries,
        max_keys=max_keys,
        num_splits=num_splits,
        sinks=None if sinks is None else sinks.contiguous(),
        VALUE_DIM=value_dim,
        BLOCK_N=config.block_n,
        BLOCK_DV=block_dv,
    )
    attend = dict(
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        out=parts,
        lse=part_lse,
        block_table=None if block_table is None else block_table.contiguous(),
        key_scale=None if key_scale is None else key_scale.contiguous(),
        value_scale=None if value_scale is None else value_scale.contiguous(),
        rel_table=rel_table,
        alibi_slopes=None if alibi_slopes is None else alibi_slopes.contiguous(),
        scale=scale,
        softcap=softcap,
        key_heads=key_heads,
        group_size=group_size,
        stride_os=part_stride,
        stride_ls=rows,
        stride_t=0 if block_table is None else block_table.shape[1],
        SPLIT=split,
        SOFTCAP=softcap > 0.0,
        PAGE_SIZE=page_size,
        FP8=fp8,
        HEAD_DIM=head_dim,
        BLOCK_M=config.block_m,
        BLOCK_D=block_d,
        **_relative_bias_constants(rel_table, rel_kind, rel_max_distance),
        **_strides("q", "bhmd", query),
        **_strides("k", "bhnd", key_cache),
        **_strides("v", "bhnd", value_cache),
        **_strides("o", "bhm", parts[0] if split else out),
        **shared,
    )
    launch = Launch(decode_kernel, programs * num_splits, attend, config.num_warps, config.num_stages)
    if not split:
        return (launch,)
    join = dict(
        parts=parts,
        part_lse=part_lse,
        out=out,
        lse=lse,
        heads=heads,
        rows=rows,
        BLOCK_S=BLOCK_S,
        **_strides("o", "bhm", out),
        **shared,
    )
    return launch, Launch(decode_reduction_kernel, rows, join, 2, 1)


def _fp8_conversion(architecture: str) -> str:
    """How float8_e4m3fn becomes a number: NVIDIA's from sm_89 on have an instruction; AMD's, before gfx950,
    only for another e4m3, which has no negative zero.
    """
    return "instruction" if architecture.startswith("sm_") and int(architecture[3:]) >= 89 else "bits"


def _relative_bias_constants(rel_table: torch.Tensor | None, kind: str, max_distance: int) -> dict[str, Any]:
    if rel_table is None:
        return dict(stride_rb=0, stride_rh=0, REL_EXACT=0, REL_THRESHOLDS=())
    num_buckets = rel_table.shape[0]
    return dict(
        stride_rb=rel_table.stride(0),
        stride_rh=rel_table.stride(1),
        REL_EXACT=directional_buckets(kind, num_buckets) // 2,
        REL_THRESHOLDS=bucket_thresholds(kind, num_buckets, max_distance),
    )


def _strides(letter: str, axes: str, x: torch.Tensor) -> dict[str, int]:
    return {f"stride_{letter}{axis}": stride for axis, stride in zip(axes, x.stride(), strict=False)}
