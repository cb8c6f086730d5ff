"""Relative position bias by distance: what the buckets of a table say for every distance and head.

Attention adds it to every score near the diagonal. There the bucket of each score would cost more than its
share of the matrix products (some twenty integer operations); by distance it is one load, from a few hundred
contiguous values, and buckets are computed once a distance and head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch
from .relative_bias import bucket_thresholds, directional_buckets

__all__ = ["MARGIN", "bias_by_distance", "distances_of", "plan_bias_by_distance"]

BLOCK = 256
# How far the values go on beyond the last distance at which they change: attention's tiles, up to 256 by
# 256, look them up across it without bounds.
MARGIN = 512


def bias_by_distance(
    rel_table: torch.Tensor, rel_kind: str, rel_max_distance: int, factor: float
) -> torch.Tensor:
    """A relative bias as float32 [Hq, n]: the value of head h at distance d is [h, n // 2 + d].

    Distance is key position less query position. n is `distances_of(...)`; from n // 2 - MARGIN on, in either
    direction, values are equal.

    Args:
        rel_table: [num_buckets, Hq], any strides and float dtype.
        rel_kind: "t5", "t5-causal" or "mpnet".
        rel_max_distance: distances from here on share the last bucket.
        factor: what the values are multiplied by.
    """
    distances = distances_of(rel_kind, rel_table.shape[0], rel_max_distance)
    out = rel_table.new_empty(rel_table.shape[1], distances, dtype=torch.float32)
    if out.numel():
        plan_bias_by_distance(rel_table, rel_kind, rel_max_distance, factor, out).run(rel_table.device)
    return out


def distances_of(rel_kind: str, num_buckets: int, rel_max_distance: int) -> int:
    """How many distances, negative and positive, `bias_by_distance` gives values for."""
    thresholds = bucket_thresholds(rel_kind, num_buckets, rel_max_distance)
    last = thresholds[-1] if thresholds else directional_buckets(rel_kind, num_buckets) // 2
    return 2 * (last + MARGIN) + 1


def plan_bias_by_distance(
    rel_table: torch.Tensor, rel_kind: str, rel_max_distance: int, factor: float, out: torch.Tensor
) -> Launch:
    """The launch of `bias_by_distance` into `out`."""
    num_buckets, heads = rel_table.shape
    buckets = directional_buckets(rel_kind, num_buckets)
    arguments = dict(
        table=rel_table,
        out=out,
        heads=heads,
        columns=out.shape[1],
        factor=factor,
        stride_bucket=rel_table.stride(0),
        stride_head=rel_table.stride(1),
        BIDIRECTIONAL=rel_kind != "t5-causal",
        BUCKETS=buckets,
        EXACT=buckets // 2,
        THRESHOLDS=bucket_thresholds(rel_kind, num_buckets, rel_max_distance),
        BLOCK=BLOCK,
    )
    programs = heads * triton.cdiv(out.shape[1], BLOCK)
    return Launch(bias_by_distance_kernel, programs, arguments, num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["heads", "columns"])
def bias_by_distance_kernel(
    table, out, heads, columns, factor, stride_bucket, stride_head, BIDIRECTIONAL: tl.constexpr,
    BUCKETS: tl.constexpr, EXACT: tl.constexpr, THRESHOLDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bias of one head at BLOCK distances."""
    head = tl.program_id(0) % heads
    column = tl.program_id(0) // heads * BLOCK + tl.arange(0, BLOCK)
    distance = column - columns // 2
    after = distance > 0
    steps = tl.abs(distance) if BIDIRECTIONAL else tl.where(after, 0, -distance)
    bucket = tl.minimum(steps, EXACT)
    for index in tl.static_range(len(THRESHOLDS)):
        bucket += (steps >= THRESHOLDS[index]).to(tl.int32)
    if BIDIRECTIONAL:
        bucket += tl.where(after, BUCKETS, 0)
    inside = column < columns
    bias = tl.load(table + bucket * stride_bucket + head * stride_head, mask=inside, other=0)
    tl.store(out + head.to(tl.int64) * columns + column, bias.to(tl.float32) * factor, mask=inside)
