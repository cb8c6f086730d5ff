"""The keys and values of sequences being decoded, contiguous or paged, quantized or not, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["DecodeCache"]


@dataclass(frozen=True, eq=False)
class DecodeCache:
    """The arguments of `fastattn::decode_attention` that hold keys and values, under their names there."""

    key_cache: Tensor
    value_cache: Tensor
    cache_lengths: Tensor
    block_table: Tensor | None
    key_scale: Tensor | None
    value_scale: Tensor | None

    @property
    def quantized(self) -> bool:
        return self.key_scale is not None

    @property
    def capacity(self) -> int:
        """How many keys a sequence can have."""
        if self.block_table is None:
            return self.key_cache.shape[2]
        return self.block_table.shape[1] * self.key_cache.shape[1]

    def read(self, batch: slice, keys: tuple[int, int], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Keys and values [b, Hkv, n, D] of the sequences `batch`, from the first to the second of `keys`, of
        which only the pages are read: in `dtype` and times their scales, or as they are where it is None.
        """
        key, value = (self._rows(cache, batch, keys) for cache in (self.key_cache, self.value_cache))
        if dtype is not None:
            key, value = key.to(dtype), value.to(dtype)
            if self.key_scale is not None and self.value_scale is not None:
                key = key * self.key_scale.to(dtype)[:, None, None]
                value = value * self.value_scale.to(dtype)[:, None, None]
        return key, value

    def _rows(self, cache: Tensor, batch: slice, keys: tuple[int, int]) -> Tensor:
        if self.block_table is None:
            return cache[batch, :, keys[0] : keys[1]]
        blocks, size = cache.shape[:2]
        first, last = keys[0] // size, -(-keys[1] // size)
        # Entries of the table that no key uses may be anything; they are followed to some page that exists.
        pages = self.block_table[batch, first:last].clamp(0, max(blocks - 1, 0))
        rows = cache[pages].flatten(1, 2)[:, keys[0] - first * size : keys[1] - first * size]
        return rows.transpose(1, 2)
