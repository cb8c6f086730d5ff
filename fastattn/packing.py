"""Padding-free execution: pack once, run every layer on real tokens, unpack once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastattn.ops.validation import is_traced

__all__ = [
    "PADDINGS",
    "Dense",
    "Packing",
    "PackingError",
    "PackingThreshold",
    "can_pack",
    "data_dependent_shapes",
    "is_right_padded",
]

PADDINGS = ("auto", "packed", "padded")

_data_dependent: ContextVar[bool] = ContextVar("fastattn_data_dependent_shapes", default=False)


class PackingError(RuntimeError):
    """`padding="packed"` was asked for and this call cannot run packed; the message names the reason."""


@contextmanager
def data_dependent_shapes() -> Iterator[None]:
    """Pack while `torch.export` traces, though the number of real tokens is then a symbol.

    A flag of our own: before torch 2.14 `torch.compiler.is_exporting()` is also true under `torch.compile`,
    which cannot take such a symbol without a graph break.
    """
    token = _data_dependent.set(True)
    try:
        yield
    finally:
        _data_dependent.reset(token)


def can_pack(x: Tensor) -> bool:
    """Whether shapes may depend on the values of `x` here: outside tracing, and while our export traces."""
    # Dynamo cannot read a ContextVar; our export traces without it. A jit trace runs on real values, and
    # would keep this batch's for every other.
    if torch.compiler.is_dynamo_compiling() or torch.jit.is_tracing():
        return False
    return not is_traced(x) or _data_dependent.get()


@dataclass(frozen=True)
class Packing:
    """Which tokens of a padded batch [B, S] are computed, and where their sequences begin and end.

    Computed are the real tokens and the first token of every sequence, which heads read even where it is
    padding (left padding); such a first token is a query but never a key.

    Attributes:
        rows: int64 [Tq], the positions of computed tokens in the flattened batch.
        key_rows: int64 [Tk], which of the computed tokens are real; None when all are.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], bounds of the sequences among computed and among real
            tokens.
        batch_size: B.
        length: S, an upper bound of every sequence's length.
        bounds: cu_seqlens_q and cu_seqlens_k as plain numbers, on a CPU; None where reading them would wait
            for a GPU, and in a traced graph.
        order: int64 [B], which sequence of the batch each is, sorted by length on a CPU; None where they
            are in the batch's order.
        hidden: bool [Tq], which of the computed tokens are padding that attention must not see as keys; None
            where `key_rows` tells.
    """

    rows: Tensor
    key_rows: Tensor | None
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    batch_size: int
    length: int
    bounds: tuple[list[int], list[int]] | None = None
    order: Tensor | None = None
    hidden: Tensor | None = None

    @classmethod
    def up_to_the_last_token(cls, mask: Tensor) -> Packing:
        """The packing of a traced padding mask, bool [B, S], in which tokens are as far apart as in the
        batch.

        A graph cannot tell on which side padding is. So all of a sequence is computed up to its last real
        token, and the padding in it is a `hidden` key: what is on the right is left out, and what is
        elsewhere computed, as it must be where positions are relative.
        """
        batch_size, length = mask.shape
        position = torch.arange(length, device=mask.device)
        last = torch.where(mask, position, 0).amax(1, keepdim=True)
        computed = position <= last
        rows = computed.flatten().nonzero().squeeze(1)
        bounds = _bounds(computed)
        hidden = ~mask.flatten().index_select(0, rows)
        return cls(rows, None, bounds, bounds, batch_size, length, hidden=hidden)

    @classmethod
    def from_mask(cls, mask: Tensor) -> Packing | None:
        """The packing of a padding mask, bool [B, S] with True = real; None where nothing is padding."""
        batch_size, length = mask.shape
        traced = is_traced(mask)
        if not traced and bool(mask.all()):
            return None
        first = torch.arange(length, device=mask.device) == 0
        computed = mask | first
        bounds, order = None, None
        if not traced and mask.device.type == "cpu":
            # Sequences of one length side by side, which attention then computes in one call.
            order = (computed.sum(1) * (length + 1) + mask.sum(1)).argsort(stable=True)
            mask, computed = mask[order], computed[order]
        rows = computed.flatten().nonzero().squeeze(1)
        cu_seqlens_q = _bounds(computed)
        cu_seqlens_k, key_rows = cu_seqlens_q, None
        if traced or not bool(mask[:, 0].all()):
            cu_seqlens_k, key_rows = _bounds(mask), mask.flatten()[rows].nonzero().squeeze(1)
        if order is not None:
            bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
            rows = order[rows // length] * length + rows % length
        return cls(rows, key_rows, cu_seqlens_q, cu_seqlens_k, batch_size, length, bounds, order)

    @cached_property
    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """Sequences of one length in a row: their first token, their number and length; none where the bounds
        are not known, or a computed token is no key.
        """
        if self.bounds is None or self.key_rows is not None:
            return ()
        lengths = [end - start for start, end in pairwise(self.bounds[0])]
        found, start = [], 0
        for length, group in groupby(lengths):
            count = len(list(group))
            found.append((start, count, length))
            start += count * length
        return tuple(found)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, N] -> [1, Tq, N]: the computed tokens, sequence after sequence."""
        return padded.flatten(0, 1).index_select(0, self.rows).unsqueeze(0)

    def pack_rows(self, x: Tensor) -> Tensor:
        """[B or 1, S, N] -> [1, Tq, N]: what belongs to the computed tokens, of one table or one each."""
        if x.shape[0] == 1 and not is_traced(self.rows):
            return x[:, self.rows % self.length]
        # No remainder of a symbol in a graph.
        return self.pack(x.expand(self.batch_size, -1, -1))

    def unpack(self, packed: Tensor) -> Tensor:
        """[1, Tq, N] -> [B, S, N], zeros where nothing was computed."""
        padded = packed.new_zeros(self.batch_size * self.length, packed.shape[-1])
        return padded.index_copy(0, self.rows, packed[0]).view(self.batch_size, self.length, -1)

    def keys(self, x: Tensor) -> Tensor:
        """[Tq, ...] -> [Tk, ...]: the rows that are real tokens."""
        return x if self.key_rows is None else x.index_select(0, self.key_rows)


@dataclass(frozen=True)
class PackingThreshold:
    """From which fill on a batch is faster computed with its padding than packed, as measured on one device.

    Attributes:
        device: the type of that device, as `torch.device.type` has it; tensors of others are always packed.
        fills: (positions, fill): batches of B * S = positions run padded from that fill on, 1.0 where none
            with padding does. A batch of another size goes by the nearest one measured.
    """

    device: str
    fills: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        for positions, fill in self.fills:
            if positions < 1 or not 0 <= fill <= 1:
                raise ValueError(
                    f"fills has {(positions, fill)}; it must hold pairs of positions, 1 or more, and a fill "
                    "from 0 to 1"
                )

    def is_dense(self, mask: Tensor) -> bool:
        """Whether a batch with this padding mask, bool [B, S] with True = real, is to run padded."""
        # Values of a traced mask are not known; a graph packs, or not, for every batch alike.
        if not self.fills or mask.device.type != self.device or is_traced(mask) or not mask.numel():
            return False
        positions = mask.numel()
        _, fill = min(self.fills, key=lambda each: max(each[0] / positions, positions / each[0]))
        return fill < 1 and fill * positions <= int(mask.sum()) < positions


@dataclass(frozen=True)
class Dense:
    """A padded batch so full that all of it is computed: stands where a `Packing` would, and its outputs have
    their zeros at the same positions.

    Attributes:
        mask: bool [B, S], True = real.
    """

    mask: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """[B, S, N] as it is."""
        return padded

    def unpack(self, padded: Tensor) -> Tensor:
        """[B, S, N] -> [B, S, N], zeros where a `Packing` would have computed nothing."""
        first = torch.arange(self.mask.shape[1], device=self.mask.device) == 0
        return padded.masked_fill(~(self.mask | first).unsqueeze(-1), 0)


def is_right_padded(mask: Tensor) -> bool:
    """Whether every row of a padding mask, bool [B, S], is real tokens first and padding after."""
    return not bool((mask[:, 1:] & ~mask[:, :-1]).any())


def _bounds(mask: Tensor) -> Tensor:
    return pad(mask.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
