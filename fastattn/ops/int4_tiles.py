"""The tiled layout of int4 weights that PyTorch's AVX512 kernel multiplies by: a permutation of nibbles."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["TILED", "TILE_ROWS", "tile_halves", "tiled", "tiles_are_the_kernels", "untiled"]

TILED = "int4-tiles-64"
TILE_ROWS = 64


def tiled(values: Tensor, in_features: int) -> Tensor:
    """Packed integers [N, K / 2], two columns a byte, as tiles of 64 rows: a byte holds rows i (low bits) and
    i + 32 of one column, and 32 of them follow one another before the next column. The shape stays.
    """
    integers = torch.stack((values & 15, values >> 4 & 15), dim=-1)
    low, high = integers.view(-1, 2, TILE_ROWS // 2, in_features).unbind(1)
    return (low | high << 4).transpose(1, 2).contiguous().view(values.shape)


def untiled(values: Tensor, in_features: int) -> Tensor:
    """What `tiled` was given."""
    low, high = tile_halves(values, in_features)
    integers = torch.cat((low.transpose(1, 2), high.transpose(1, 2)), dim=1)
    even, odd = integers.reshape(values.shape[0], -1, 2).unbind(2)
    return even | odd << 4


def tile_halves(values: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
    """The integers 0 to 15 of rows 0 to 31 and of rows 32 to 63 of every tile, int8 [tiles, K, 32] each."""
    tiles = values.view(-1, in_features, TILE_ROWS // 2)
    return tiles & 15, tiles >> 4 & 15


@cache
def tiles_are_the_kernels() -> bool:
    """Whether this machine's kernel has this layout (that of AVX2, say, is another): asked of PyTorch once,
    with two tiles of numbers that no other order gives.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    # i * i + i // 3 modulo 16 repeats with none of the layout's strides.
    steps = torch.arange(2 * TILE_ROWS * 32, dtype=torch.int32).view(2 * TILE_ROWS, 32)
    integers = (steps * steps + steps // 3) % 16
    try:
        kernels = torch.ops.aten._convert_weight_to_int4pack_for_cpu(integers, 1)
    except (AttributeError, RuntimeError):
        return False
    even, odd = integers.to(torch.int8).view(2 * TILE_ROWS, -1, 2).unbind(2)
    return torch.equal(kernels.view(torch.int8).view(2 * TILE_ROWS, -1), tiled(even | odd << 4, 32))
