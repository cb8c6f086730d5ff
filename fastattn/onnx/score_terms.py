"""ONNX subgraphs of what shapes attention scores beside query and key: positions, biases, visibility.

The formulas are `fastattn.ops.attention_terms`' own; an `AttentionTerms` here holds graph values for tensors.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.graph import vector
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.relative_bias import bucket_of_distance

__all__ = ["Positions", "position_bias", "present_keys", "unless_unbounded", "visible_keys"]


class Positions:
    """Where keys stand relative to queries; each subgraph is emitted once, and only where it is asked for.

    Args:
        queries, keys: how many there are, int64 [1].
        terms: `query_start` or `query_starts` say where query 0 is among the keys.
    """

    def __init__(self, queries: Any, keys: Any, terms: AttentionTerms) -> None:
        self.queries, self._keys, self._terms = queries, keys, terms
        self._columns: Any = None
        self._distance: Any = None

    @property
    def columns(self) -> Any:
        """The keys' numbers, int64 [Sk]."""
        if self._columns is None:
            self._columns = _numbers(self._keys)
        return self._columns

    @property
    def distance(self) -> Any:
        """Key less query position, int64 [1 or B, 1, Sq, Sk]."""
        if self._distance is None:
            terms = self._terms
            start = terms.query_start if terms.query_starts is None else terms.query_starts
            start = vector(start) if isinstance(start, int) else op.Cast(start, to=ir.DataType.INT64)
            rows = op.Unsqueeze(_numbers(self.queries), [1])
            self._distance = op.Sub(self.columns, op.Add(rows, op.Reshape(start, vector(-1, 1, 1, 1))))
        return self._distance


def _numbers(count: Any) -> Any:
    return op.Range(0, op.Squeeze(count, [0]), 1)


def present_keys(terms: AttentionTerms, positions: Positions) -> Any | None:
    """The keys that exist, bool [B, Sk]; None where nothing cuts them off."""
    if terms.key_lengths is None:
        return None
    return op.Less(
        positions.columns, op.Unsqueeze(op.Cast(terms.key_lengths, to=ir.DataType.INT64), vector(1))
    )


def visible_keys(terms: AttentionTerms, positions: Positions, present: Any | None) -> Any | None:
    """What each query may see, bool broadcastable to [B, Hq, Sq, Sk]; None where it is everything."""
    found = []
    if terms.mask is not None:
        mask: Any = terms.mask
        found.append(op.Unsqueeze(mask, vector(1, 2)) if len(mask.shape) == 2 else mask)
    if present is not None:
        found.append(op.Unsqueeze(present, vector(1, 2)))
    before, after = terms.reach
    if not isinstance(after, int) or after >= 0:
        found.append(unless_unbounded(after, op.LessOrEqual(positions.distance, after)))
    if not isinstance(before, int):
        found.append(unless_unbounded(before, op.GreaterOrEqual(positions.distance, op.Neg(before))))
    elif before >= 0:
        found.append(op.GreaterOrEqual(positions.distance, -before))
    return reduce(op.And, found) if found else None


def unless_unbounded(bound: Any, near: Any) -> Any:
    """`near`, or everything where a bound known only when the graph runs is negative."""
    return near if isinstance(bound, int) else op.Or(op.Less(bound, 0), near)


def position_bias(terms: AttentionTerms, positions: Positions, dtype: Any) -> Any | None:
    """Relative bias and ALiBi, `dtype` [1 or B, Hq, Sq, Sk]; None where there is neither."""
    added = None
    if terms.rel_table is not None:
        added = _relative_bias(terms, positions, dtype)
    if terms.alibi_slopes is not None:
        slopes = op.Reshape(op.Neg(op.Cast(terms.alibi_slopes, to=dtype)), vector(1, -1, 1, 1))
        alibi = op.Mul(slopes, op.Cast(op.Abs(positions.distance), to=dtype))
        added = alibi if added is None else op.Add(added, alibi)
    return added


def _relative_bias(terms: AttentionTerms, positions: Positions, dtype: Any) -> Any:
    """A head's values by distance, which the buckets make of the table once, looked up by clipped distance.

    The graph holds the bucket of each distance as PyTorch computes it: a logarithm in the graph could fall on
    the other side of a bucket's boundary.
    """
    table: Any = terms.rel_table
    furthest = terms.rel_max_distance
    buckets = bucket_of_distance(terms.rel_kind, table.shape[0], furthest)
    by_distance = op.Gather(op.Cast(table, to=dtype), vector(*buckets), axis=0)
    index = op.Squeeze(op.Add(op.Clip(positions.distance, -furthest, furthest), furthest), vector(1))
    # Heads last, then transposed: five times as fast as looking up single numbers for each head.
    return op.Transpose(op.Gather(by_distance, index, axis=0), perm=[0, 3, 1, 2])
