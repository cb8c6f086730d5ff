"""What shapes the scores of attention beyond query and key, as one value that every face passes on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.ops.relative_bias import bias_by_distance

__all__ = ["AttentionTerms", "sequence_terms"]


@dataclass(frozen=True, eq=False)
class AttentionTerms:
    """The arguments of `fastattn::attention` after query, key and value, under their names in the schema.

    The position of query i among the keys is i + query_start (`query_starts`, int [B], has precedence).
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    rel_table: Tensor | None = None
    rel_kind: str = "t5"
    rel_max_distance: int = 128
    alibi_slopes: Tensor | None = None
    key_lengths: Tensor | None = None
    causal: bool = False
    query_start: int = 0
    query_starts: Tensor | None = None
    window_left: int = -1
    window_right: int = -1
    scale: float = 1.0
    softcap: float = 0.0
    sinks: Tensor | None = None
    dropout_p: float = 0.0
    seed: Tensor | None = None
    return_lse: bool = False

    @property
    def reach(self) -> tuple[int, int]:
        """How many keys before and after its own position a query sees, -1 = all."""
        if not self.causal:
            return self.window_left, self.window_right
        return self.window_left, 0

    @property
    def depends_on_position(self) -> bool:
        """Whether `query_start` matters at all."""
        return self.reach != (-1, -1) or self.rel_table is not None or self.alibi_slopes is not None

    def visible(self, rows: tuple[int, int], columns: tuple[int, int], device: torch.device) -> Tensor | None:
        """Which of the keys `columns` the queries `rows` may attend: bool broadcastable to
        [B, Hq, rows, columns]; None when all.
        """
        visible = None
        if self.mask is not None:
            visible = self.mask[:, None, None, :] if self.mask.dim() == 2 else self.mask
            visible = _tile_of(visible, rows, columns)
        if self.key_lengths is not None:
            present = torch.arange(*columns, device=device) < self.key_lengths[:, None, None, None]
            visible = present if visible is None else visible & present
        left, right = self.reach
        if left >= 0 or right >= 0:
            distance = self._distance(rows, columns, device)
            if right >= 0:
                near = distance <= right
                visible = near if visible is None else visible & near
            if left >= 0:
                near = distance >= -left
                visible = near if visible is None else visible & near
        return visible

    def added(
        self, rows: tuple[int, int], columns: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> Tensor | None:
        """The sum of bias, relative bias and ALiBi for queries `rows` and keys `columns`, in `dtype`,
        broadcastable to [B, Hq, rows, columns]; None when there is none.
        """
        added = None if self.bias is None else _tile_of(self.bias, rows, columns).to(dtype)
        if self.rel_table is not None:
            relative = self._relative_bias(self.rel_table.to(dtype), rows, columns)
            added = relative if added is None else added + relative
        if self.alibi_slopes is not None:
            distance = self._distance(rows, columns, device)
            alibi = self.alibi_slopes.to(dtype)[:, None, None] * -distance.abs().to(dtype)
            added = alibi if added is None else added + alibi
        return added

    def _relative_bias(self, table: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        """[1 or B, Hq, rows, columns], looked up once a distance, not once a query and key: each row is that
        below it, moved on by one.
        """
        start = self.query_start if self.query_starts is None else self.query_starts[:, None]
        # One distance more than there are, so that a tile without rows has one to move too.
        first, last = columns[0] - rows[1], columns[1] - rows[0]
        distances = torch.arange(first, last, device=table.device)[None] - start
        furthest = self.rel_max_distance
        by_distance = bias_by_distance(table, self.rel_kind, furthest)
        values = by_distance[:, distances.clamp(-furthest, furthest) + furthest]  # [Hq, 1 or B, distances]
        windows = values.unfold(2, columns[1] - columns[0], 1)[:, :, 1:]
        return windows.flip(2).transpose(0, 1)

    def _distance(self, rows: tuple[int, int], columns: tuple[int, int], device: torch.device) -> Tensor:
        """Key less query position: int64 [1 or B, 1, rows, columns]."""
        starts = self.query_start if self.query_starts is None else self.query_starts[:, None, None, None]
        position = torch.arange(*rows, device=device)[None, None, :, None] + starts
        return torch.arange(*columns, device=device) - position


def _tile_of(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """The part of a 4-D mask or bias, broadcast dimensions kept, that belongs to `rows` and `columns`."""
    if x.shape[2] != 1:
        x = x[:, :, rows[0] : rows[1]]
    return x if x.shape[3] == 1 else x[..., columns[0] : columns[1]]


def sequence_terms(
    terms: AttentionTerms, bounds_q: list[int], bounds_k: list[int], default_start: bool
) -> list[AttentionTerms]:
    """The terms of each packed sequence alone, its query_start a plain number.

    Args:
        terms: those of the packed call; `query_starts` [B] has precedence over `query_start`.
        bounds_q, bounds_k: where each sequence begins, and the end of the last.
        default_start: each sequence's query_start is its keys less its queries, whatever `terms` say.
    """
    sequences = len(bounds_q) - 1
    if not terms.depends_on_position:
        return [terms] * sequences
    if default_start:
        starts = [bounds_k[i + 1] - bounds_k[i] - (bounds_q[i + 1] - bounds_q[i]) for i in range(sequences)]
    elif terms.query_starts is not None:
        starts = terms.query_starts.tolist()
    else:
        starts = [terms.query_start] * sequences
    # Most often all sequences start alike, and making terms takes as long as a short sequence's attention.
    at = {start: replace(terms, query_start=start, query_starts=None) for start in set(starts)}
    return [at[start] for start in starts]
