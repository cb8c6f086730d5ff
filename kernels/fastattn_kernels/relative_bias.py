"""Buckets of relative position biases (T5, MPNet) as integers, for kernels that must not take a logarithm."""

from __future__ import annotations

import math
from functools import cache

import torch

__all__ = ["KINDS", "bucket_thresholds", "directional_buckets"]

KINDS = ("t5", "t5-causal", "mpnet")


def directional_buckets(kind: str, num_buckets: int) -> int:
    """Buckets that the distances of one direction share: half of them where both directions have their own.

    Raises:
        ValueError: another kind than "t5", "t5-causal" and "mpnet".
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    return num_buckets if kind == "t5-causal" else num_buckets // 2


@cache
def bucket_thresholds(kind: str, num_buckets: int, max_distance: int) -> tuple[int, ...]:
    """Where the buckets of the logarithmic half begin.

    With n the distance in one direction and `exact = directional_buckets(kind, num_buckets) // 2`, the bucket
    is n below `exact` and otherwise exact plus the number of thresholds that are at most n; keys after the
    query then take the second half of the table ("t5", "mpnet") or the bucket of n = 0 ("t5-causal").

    The formula is that of transformers (`T5Attention._relative_position_bucket`, and MPNet's twin), float32
    logarithm included: its rounding decides on which side of a boundary a distance falls, so it is run here,
    once, by the same PyTorch operations on the CPU, and kernels compare integers.

    Args:
        kind: "t5" (both directions), "t5-causal" or "mpnet".
        num_buckets: rows of the table.
        max_distance: distances from here on share the last bucket.

    Returns:
        `directional_buckets - exact - 1` distances that never decrease, none above `max_distance`; two are
        equal where a bucket is empty.

    Raises:
        ValueError: another kind, or numbers for which the formula divides by zero.

    Example:
        >>> bucket_thresholds("t5", 32, 128)
        (12, 16, 23, 32, 46, 64, 91)
    """
    buckets = directional_buckets(kind, num_buckets)
    exact = buckets // 2
    if exact < 1 or max_distance <= exact:
        raise ValueError(
            f"{num_buckets} buckets up to distance {max_distance} are not {kind} buckets: each direction "
            "needs two, and a maximal distance beyond those that have a bucket each"
        )
    distances = torch.arange(exact, max_distance + 1)
    logarithmic = (
        torch.log(distances.float() / exact) / math.log(max_distance / exact) * (buckets - exact)
    ).to(torch.long)
    first = torch.searchsorted(logarithmic, torch.arange(1, buckets - exact))
    return tuple((first + exact).tolist())
