"""Tensors as rows for the pointwise kernels: two levels of any stride, so that hardly any is copied."""

from __future__ import annotations

from itertools import pairwise
from math import prod

import torch
import triton
import triton.language as tl

__all__ = ["as_rows", "row_strides"]


@triton.jit
def row_offsets(rows, row_count, inner, stride_outer, stride):
    """Where each of the int64 `rows` begins; `inner` rows lie `stride` apart, then `stride_outer`.

    `inner` is None where all rows are evenly apart.
    """
    if inner is None:
        return rows * stride
    else:
        # Division of 64 bits is slow; row_count has 32 wherever they do.
        narrow = rows.to(row_count.dtype)
        return (narrow // inner).to(tl.int64) * stride_outer + (narrow % inner).to(tl.int64) * stride


def as_rows(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors of one shape [..., N] as [outer, inner, N] of one shape, with contiguous last dimensions.

    Views wherever the leading dimensions of all fold into two (three-dimensional tensors always do, heads
    split from a packed product, too), copies where not.
    """
    ready = [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]
    leading = ready[0].shape[:-1]
    for split in range(len(leading)):
        if all(_folds(x, 0, split) and _folds(x, split, len(leading)) for x in ready):
            break
    else:
        split, ready = 0, [x.contiguous() for x in ready]
    shape = (prod(leading[:split]), prod(leading[split:]), ready[0].shape[-1])
    return [x.view(shape) for x in ready]


def _folds(x: torch.Tensor, first: int, last: int) -> bool:
    """Whether the dimensions from `first` to before `last` have one stride."""
    dimensions = [dimension for dimension in range(first, last) if x.shape[dimension] != 1]
    return all(x.stride(outer) == x.stride(inner) * x.shape[inner] for outer, inner in pairwise(dimensions))


def row_strides(x: torch.Tensor) -> tuple[int | None, int, int]:
    """(inner, stride_outer, stride) of `row_offsets` for an [outer, inner, N] of `as_rows`."""
    outer, inner, _ = x.shape
    return (None if outer == 1 else inner), x.stride(0), x.stride(1)
