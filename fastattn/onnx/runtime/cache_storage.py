"""Buffers of keys and values that an ONNX Runtime session reads and extends, shared or swapped."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CacheEntry", "CacheStorage", "GrowingStorage", "SharedStorage", "bind_input", "bind_output"]

NUMPY_DTYPES = {torch.float32: np.float32, torch.float16: np.float16}


@dataclass(frozen=True)
class CacheEntry:
    """Keys or values of one layer.

    Attributes:
        past, present: the graph's input and output, [batch, heads, positions, size].
    """

    past: str
    present: str
    heads: int
    size: int


def bind_input(binding: Any, name: str, tensor: Tensor) -> None:
    """Bind a contiguous tensor, which must outlive the run."""
    device = tensor.device
    dtype = NUMPY_DTYPES[tensor.dtype]
    binding.bind_input(name, device.type, device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr())


def bind_output(binding: Any, name: str, tensor: Tensor) -> None:
    """Bind a contiguous tensor to be written, which must outlive the run."""
    device = tensor.device
    dtype = NUMPY_DTYPES[tensor.dtype]
    binding.bind_output(name, device.type, device.index or 0, dtype, tuple(tensor.shape), tensor.data_ptr())


class CacheStorage(ABC):
    """Room for `capacity` positions of every entry, `length` of them filled. Nothing is held before
    `reserve`.

    Attributes:
        batch, length, capacity: rows, positions filled, and positions there is room for.
        version: counts up whenever something else has to be bound than before.
    """

    def __init__(self, entries: tuple[CacheEntry, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.entries, self.dtype, self.device = entries, dtype, device
        self.batch = self.length = self.capacity = self.version = 0

    def reserve(self, batch: int, length: int, capacity: int) -> None:
        """Make room for `length` positions; where buffers have to be made anew, for `capacity`, if that is
        more.

        Raises:
            ValueError: the filled positions are of another batch size.
        """
        if self.length and batch != self.batch:
            raise ValueError(f"past_key_values holds {self.batch} rows; input_ids has {batch}")
        if batch == self.batch and length <= self.capacity:
            return
        # Doubling what there is: a cache that grows token by token is copied a few times, not every time.
        self._allocate(batch, max(length, capacity, 2 * self.capacity if self.length else 0))
        self.version += 1

    @abstractmethod
    def filled(self) -> list[Tensor]:
        """Views [batch, heads, length, size] of the filled positions, in the entries' order."""

    @abstractmethod
    def bind(self, binding: Any, new: int) -> None:
        """Bind past and present for a run that adds `new` positions."""

    def advance(self, new: int) -> None:
        """Take the run's present as filled."""
        self.length += new

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first `length` positions."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows, int64 [new batch], in this order; a row may be taken several times."""
        if rows.numel() == self.batch and torch.equal(rows, torch.arange(self.batch, device=rows.device)):
            return
        self._replace([tensor.index_select(0, rows.to(tensor.device)) for tensor in self.filled()])

    def _replace(self, filled: list[Tensor]) -> None:
        """Put other values of the same length in place of the filled positions."""
        length, self.length = self.length, 0
        self.reserve(filled[0].shape[0], length, self.capacity)
        self.length = length
        for view, tensor in zip(self.filled(), filled, strict=True):
            view.copy_(tensor)

    @abstractmethod
    def _allocate(self, batch: int, capacity: int) -> None:
        """Make the buffers, and copy what is filled."""


class SharedStorage(CacheStorage):
    """One buffer [batch, heads, capacity, size] an entry, past and present at once."""

    buffers: list[Tensor]

    def filled(self) -> list[Tensor]:
        return [buffer[:, :, : self.length] for buffer in self.buffers]

    def bind(self, binding: Any, new: int) -> None:
        for entry, buffer in zip(self.entries, self.buffers, strict=True):
            bind_input(binding, entry.past, buffer)
            bind_output(binding, entry.present, buffer)

    def crop(self, length: int) -> None:
        self.length = min(length, self.length)

    def _allocate(self, batch: int, capacity: int) -> None:
        # empty, not zeros: pages that no position has reached take no memory.
        made = [
            torch.empty(batch, entry.heads, capacity, entry.size, dtype=self.dtype, device=self.device)
            for entry in self.entries
        ]
        if self.length:
            for old, new in zip(self.filled(), made, strict=True):
                new[:, :, : self.length].copy_(old)
        self.buffers, self.batch, self.capacity = made, batch, capacity


class GrowingStorage(CacheStorage):
    """Two buffers an entry, past in one and present in the other, swapped after each run.

    For graphs whose past and present are of their exact lengths.
    """

    pasts: list[Tensor]
    presents: list[Tensor]

    def filled(self) -> list[Tensor]:
        return [self._view(buffer, entry, self.length) for buffer, entry in self._each(self.pasts)]

    def bind(self, binding: Any, new: int) -> None:
        for buffer, entry in self._each(self.pasts):
            bind_input(binding, entry.past, self._view(buffer, entry, self.length))
        for buffer, entry in self._each(self.presents):
            bind_output(binding, entry.present, self._view(buffer, entry, self.length + new))

    def advance(self, new: int) -> None:
        super().advance(new)
        self.pasts, self.presents = self.presents, self.pasts
        self.version += 1

    def crop(self, length: int) -> None:
        if length < self.length:
            kept = [tensor[:, :, :length].clone() for tensor in self.filled()]
            self.length = length
            self._replace(kept)
            self.version += 1

    def _each(self, buffers: list[Tensor]) -> zip[tuple[Tensor, CacheEntry]]:
        return zip(buffers, self.entries, strict=True)

    def _view(self, buffer: Tensor, entry: CacheEntry, length: int) -> Tensor:
        shape = (self.batch, entry.heads, length, entry.size)
        return buffer[: self.batch * entry.heads * length * entry.size].view(shape)

    def _allocate(self, batch: int, capacity: int) -> None:
        kept = self.filled() if self.length else []
        sizes = [batch * entry.heads * capacity * entry.size for entry in self.entries]
        self.pasts, self.presents = (
            [torch.empty(size, dtype=self.dtype, device=self.device) for size in sizes] for _ in range(2)
        )
        self.batch, self.capacity = batch, capacity
        if kept:
            for view, tensor in zip(self.filled(), kept, strict=True):
                view.copy_(tensor)
