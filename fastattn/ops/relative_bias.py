"""Relative position bias: one learned value a head for every bucket of distances, as T5 and MPNet add it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import torch
from torch import Tensor

__all__ = ["KINDS", "RelativeBias", "bias_by_distance", "bucket_of_distance", "relative_terms"]

KINDS = ("t5", "t5-causal", "mpnet")


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """A bias on the score of query position p and key j that depends on the bucket of j - p and the head.

    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer" (2020),
    section 2.1. Short distances have a bucket each, longer ones share buckets that widen logarithmically up
    to `max_distance`, beyond which all share the last. The bucket of every distance is exactly the one
    transformers computes on a CPU (`T5Attention._relative_position_bucket`,
    `MPNetEncoder.relative_position_bucket`).

    Args:
        table: [num_buckets, Hq], floating point: the weight of the model's `relative_attention_bias`.
        kind: "t5": both directions, half of the buckets each; "t5-causal": all buckets for the past, a key
            after the query shares the bucket of distance 0; "mpnet": as "t5".
        max_distance: positions from which on all share one bucket.

    Raises:
        TypeError: a table that is no floating-point tensor.
        ValueError: another kind, a table of the wrong rank or with too few buckets, or a max_distance within
            the buckets of single distances.

    Example:
        >>> import torch, fastattn
        >>> relative_bias = fastattn.ops.RelativeBias(torch.randn(32, 8), "t5", max_distance=128)
        >>> query = key = value = torch.randn(2, 8, 5, 64)
        >>> fastattn.ops.attention(query, key, value, relative_bias=relative_bias).shape
        torch.Size([2, 8, 5, 64])
    """

    table: Tensor
    kind: str = "t5"
    max_distance: int = 128

    def __post_init__(self) -> None:
        if not isinstance(self.table, Tensor) or not self.table.is_floating_point():
            given = self.table.dtype if isinstance(self.table, Tensor) else type(self.table).__name__
            raise TypeError(f"RelativeBias: table is {given}; it must be a floating-point tensor")
        if self.table.dim() != 2:
            raise ValueError(
                f"RelativeBias: table must be [num_buckets, query heads]; got {list(self.table.shape)}"
            )
        if self.kind not in KINDS:
            raise ValueError(f"RelativeBias: kind is {self.kind!r}; accepted are {', '.join(KINDS)}")
        exact = _exact_distances(self.kind, self.table.shape[0])
        if exact < 1:
            raise ValueError(
                f"RelativeBias: table has {self.table.shape[0]} buckets; kind {self.kind!r} needs at least "
                f"{2 if self.kind == 't5-causal' else 4}"
            )
        if not isinstance(self.max_distance, int) or isinstance(self.max_distance, bool):
            raise TypeError(f"RelativeBias: max_distance is {self.max_distance!r}; it must be an int")
        if self.max_distance <= exact:
            raise ValueError(
                f"RelativeBias: max_distance is {self.max_distance}; with {self.table.shape[0]} buckets of "
                f"kind {self.kind!r} it must be more than {exact}, the distances that have a bucket each"
            )


class RelativeTerms(TypedDict):
    """The three arguments of a registered schema that a RelativeBias becomes."""

    rel_table: Tensor | None
    rel_kind: str
    rel_max_distance: int


def relative_terms(relative_bias: RelativeBias | None) -> RelativeTerms:
    """`relative_bias` as the registered schemas hold it."""
    if relative_bias is None:
        return RelativeTerms(rel_table=None, rel_kind=KINDS[0], rel_max_distance=0)
    return RelativeTerms(
        rel_table=relative_bias.table,
        rel_kind=relative_bias.kind,
        rel_max_distance=relative_bias.max_distance,
    )


def _exact_distances(kind: str, num_buckets: int) -> int:
    """How many distances of one direction have a bucket of their own."""
    return (num_buckets if kind == "t5-causal" else num_buckets // 2) // 2


@lru_cache(maxsize=64)
def bucket_of_distance(kind: str, num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """The bucket of each distance j - p from -max_distance to max_distance. Distances further out have the
    bucket of the nearest end.

    A table, not the formula in place: the float32 logarithm of the formula falls on one side of each boundary
    on a CPU and may fall on the other on a GPU.
    """
    one_way = num_buckets if kind == "t5-causal" else num_buckets // 2
    exact = one_way // 2
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    steps = -distance.clamp(max=0) if kind == "t5-causal" else distance.abs()
    fraction = torch.log(steps.float() / exact) / math.log(max_distance / exact)
    logarithmic = (exact + (fraction * (one_way - exact)).to(torch.int64)).clamp(max=one_way - 1)
    bucket = torch.where(steps < exact, steps, logarithmic)
    if kind != "t5-causal":
        bucket = bucket + (distance > 0) * one_way
    return tuple(bucket.tolist())


def bias_by_distance(table: Tensor, kind: str, max_distance: int) -> Tensor:
    """The bias of each head at the distances -max_distance to max_distance: [Hq, 2 * max_distance + 1]."""
    buckets = bucket_of_distance(kind, table.shape[0], max_distance)
    return table.t()[:, torch.tensor(buckets, device=table.device)]
