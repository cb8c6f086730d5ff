"""Rotary position embedding of query and key in one launch: device code and launch.

Arguments come validated; every stride is free. A program is one token, so that its cosines and sines are
loaded once for all heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, architecture_of
from ._tuned import gpu_of
from .rotary_config import choose_rotary_config

__all__ = ["plan_rotary", "rotary_forward"]


@triton.jit
def load_pairs(
    x, offsets, stride, valid_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """The first and second elements, float32 [rows, BLOCK], of the pairs of each row."""
    if INTERLEAVED:
        # Side by side in memory: read whole, then taken apart.
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        tile = tl.load(x + offsets + columns * stride, mask=valid_rows & (columns < WIDTH), other=0.0)
        first, second = tl.split(tl.reshape(tile, (tile.shape[0], BLOCK, 2)))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        valid = valid_rows & (columns < WIDTH // 2)
        first = tl.load(x + offsets + columns * stride, mask=valid, other=0.0)
        second = tl.load(x + offsets + (columns + WIDTH // 2) * stride, mask=valid, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(
    out, offsets, stride, valid_rows, first, second, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """What `load_pairs` reads."""
    first, second = first.to(out.dtype.element_ty), second.to(out.dtype.element_ty)
    if INTERLEAVED:
        columns = tl.arange(0, 2 * BLOCK)[None, :]
        tile = tl.interleave(first, second)
        tl.store(out + offsets + columns * stride, tile, mask=valid_rows & (columns < WIDTH))
    else:
        columns = tl.arange(0, BLOCK)[None, :]
        valid = valid_rows & (columns < WIDTH // 2)
        tl.store(out + offsets + columns * stride, first, mask=valid)
        tl.store(out + offsets + (columns + WIDTH // 2) * stride, second, mask=valid)


@triton.jit
def rotate_heads(
    x, out, cos_first, cos_second, sin_first, sin_second, stride_xh, stride_xd, stride_oh, stride_od,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, at `x` and `out`."""
    for start in range(0, HEADS, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
        valid = heads < HEADS
        first, second = load_pairs(x, heads * stride_xh, stride_xd, valid, WIDTH, BLOCK, INTERLEAVED)
        rotated_first = first * cos_first - second * sin_first
        rotated_second = second * cos_second + first * sin_second
        store_pairs(
            out, heads * stride_oh, stride_od, valid, rotated_first, rotated_second, WIDTH, BLOCK, INTERLEAVED
        )
        if WIDTH < HEAD_DIM:
            columns = WIDTH + tl.arange(0, BLOCK_REST)[None, :]
            passed = valid & (columns < HEAD_DIM)
            rest = tl.load(x + heads * stride_xh + columns * stride_xd, mask=passed, other=0.0)
            tl.store(out + heads * stride_oh + columns * stride_od, rest, mask=passed)


@triton.jit(do_not_specialize=["length"])
def rotary_kernel(
    query, key, cos, sin, out_query, out_key, length,
    stride_qb, stride_qh, stride_qs, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_oqb, stride_oqh, stride_oqs, stride_oqd, stride_okb, stride_okh, stride_oks, stride_okd,
    stride_cb, stride_cs, stride_cd, stride_sb, stride_ss, stride_sd,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """One token: its cosines and sines, then the heads of query and key."""
    token = tl.program_id(0)
    batch, position = (token // length).to(tl.int64), (token % length).to(tl.int64)
    row = tl.zeros((1, 1), tl.int64)
    cos_first, cos_second = load_pairs(
        cos + batch * stride_cb + position * stride_cs, row, stride_cd, row == 0, WIDTH, BLOCK, INTERLEAVED
    )
    sin_first, sin_second = load_pairs(
        sin + batch * stride_sb + position * stride_ss, row, stride_sd, row == 0, WIDTH, BLOCK, INTERLEAVED
    )
    rotate_heads(
        query + batch * stride_qb + position * stride_qs,
        out_query + batch * stride_oqb + position * stride_oqs,
        cos_first, cos_second, sin_first, sin_second, stride_qh, stride_qd, stride_oqh, stride_oqd,
        QUERY_HEADS, HEAD_DIM, WIDTH, INTERLEAVED, BLOCK_HEADS, BLOCK, BLOCK_REST,
    )  # fmt: skip
    rotate_heads(
        key + batch * stride_kb + position * stride_ks,
        out_key + batch * stride_okb + position * stride_oks,
        cos_first, cos_second, sin_first, sin_second, stride_kh, stride_kd, stride_okh, stride_okd,
        KEY_HEADS, HEAD_DIM, WIDTH, INTERLEAVED, BLOCK_HEADS, BLOCK, BLOCK_REST,
    )  # fmt: skip


def rotary_forward(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key with the first R elements of each head rotated, computed in float32.

    Args:
        query: [B, Hq, S, D], float16, bfloat16 or float32.
        key: [B, Hk, S, D], query's dtype.
        cos, sin: [S, R], [1, S, R] or [B, S, R], R even and at most D.
        interleaved: pairs are elements 2 i and 2 i + 1, else i and i + R / 2.

    Returns:
        New tensors, laid out in memory as the arguments (`torch.empty_like`).
    """
    out_query, out_key = torch.empty_like(query), torch.empty_like(key)
    if query.numel() or key.numel():
        architecture, gpu = architecture_of(query.device), gpu_of(query.device)
        plan_rotary(query, key, cos, sin, out_query, out_key, interleaved, architecture, gpu).run(
            query.device
        )
    return out_query, out_key


def plan_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_query: torch.Tensor,
    out_key: torch.Tensor,
    interleaved: bool,
    architecture: str,
    gpu: str | None = None,
) -> Launch:
    """The launch of `rotary_forward`, writing into `out_query` and `out_key`."""
    batch, heads, length, head_dim = query.shape
    width = cos.shape[-1]
    arguments = dict(
        query=query, key=key, cos=cos, sin=sin, out_query=out_query, out_key=out_key, length=length
    )
    for name, tensor in (("q", query), ("k", key), ("oq", out_query), ("ok", out_key)):
        for dimension, stride in zip("bhsd", tensor.stride(), strict=True):
            arguments[f"stride_{name}{dimension}"] = stride
    for name, tensor in (("c", cos), ("s", sin)):
        # One table for all sequences of the batch is the same at every one: stride 0.
        each = tensor if tensor.dim() == 3 else tensor[None]
        for dimension, stride in zip("bsd", each.expand(batch, -1, -1).stride(), strict=True):
            arguments[f"stride_{name}{dimension}"] = stride
    block = triton.next_power_of_2(max(width // 2, 1))
    block_rest = triton.next_power_of_2(max(head_dim - width, 1))
    config = choose_rotary_config(heads, max(2 * block, block_rest), architecture, gpu)
    arguments |= dict(
        QUERY_HEADS=heads,
        KEY_HEADS=key.shape[1],
        HEAD_DIM=head_dim,
        WIDTH=width,
        INTERLEAVED=interleaved,
        BLOCK_HEADS=config.block_heads,
        BLOCK=block,
        BLOCK_REST=block_rest,
    )
    return Launch(rotary_kernel, batch * length, arguments, config.num_warps, num_stages=1)
