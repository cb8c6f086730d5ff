"""Checks of the arguments every attention operation takes: what shapes the scores, where the queries are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastattn.ops.relative_bias import RelativeBias
from fastattn.ops.validation import check_device, shape_of

__all__ = [
    "INTEGERS",
    "check_integers",
    "check_query_start",
    "check_score_terms",
    "check_window",
    "is_int",
]

INTEGERS = (torch.int32, torch.int64)


def is_int(x: Any) -> bool:
    """Whether `x` is a whole number, a traced one included; bool, which Python counts among them, is not."""
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def check_score_terms(
    op: str,
    query: Tensor,
    heads: int,
    *,
    relative_bias: RelativeBias | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    softcap: float,
) -> None:
    """Raise unless the terms fit `query` and its `heads`."""
    if relative_bias is not None:
        if not isinstance(relative_bias, RelativeBias):
            raise TypeError(
                f"{op}: relative_bias is {type(relative_bias).__name__}; it must be fastattn.ops.RelativeBias"
            )
        table = relative_bias.table
        check_device(op, "query", query, "relative_bias.table", table)
        if table.shape[1] != heads:
            raise ValueError(
                f"{op}: relative_bias.table must be [num_buckets, query heads] = [num_buckets, {heads}]; "
                f"got {shape_of(table)}"
            )
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is None:
            continue
        if not isinstance(x, Tensor) or not x.is_floating_point():
            given = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{op}: {name} is {given}; it must be a floating-point tensor [{heads}]")
        check_device(op, "query", query, name, x)
        if x.shape != (heads,):
            raise ValueError(
                f"{op}: {name} must be [query heads] = [{heads}], one a query head; got {shape_of(x)}"
            )
    # Compared, not math.isfinite: once two models of different head sizes were compiled, dynamo traces the
    # scale as a symbol, which that function does not take.
    if scale is not None and not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale is {scale}; it must be finite")
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap}; it must be finite and >= 0 (0 = none)")


def check_window(op: str, window: tuple[int, int] | None) -> tuple[int, int]:
    """The window (left, right) as the schema holds it, (-1, -1) where there is none."""
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(map(is_int, window)):
        raise TypeError(
            f"{op}: window is {window!r}; it must be a pair of ints (left, right), -1 = unbounded"
        )
    left, right = window
    if left < -1 or right < -1:
        raise ValueError(f"{op}: window is {window!r}; left and right must be >= -1 (-1 = unbounded)")
    return left, right


def check_query_start(
    op: str, query: Tensor, query_start: int | Tensor | None, batch: int
) -> tuple[int | None, Tensor | None]:
    """`query_start` as a number and as a tensor [batch]: None for what it is not, both None without one."""
    if isinstance(query_start, Tensor):
        check_integers(op, query, "query_start", query_start, batch, "an int or ")
        return None, query_start
    if query_start is not None and not is_int(query_start):
        raise TypeError(f"{op}: query_start is {query_start!r}; it must be an int or an int tensor [{batch}]")
    return query_start, None


def check_integers(op: str, query: Tensor, name: str, x: Tensor, batch: int, alternative: str = "") -> None:
    """Raise unless `x` is an int32 or int64 tensor [batch] on the device of `query`."""
    if not isinstance(x, Tensor) or x.dtype not in INTEGERS or x.shape != (batch,):
        given = f"{x.dtype} {shape_of(x)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{op}: {name} must be {alternative}an int32 or int64 tensor [{batch}]; got {given}")
    check_device(op, "query", query, name, x)
