"""Weights in blocks of 8 or 4 bits along the inputs, as MatMulNBits and GatherBlockQuantized store them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Blocks", "quantize_blocks"]

Floats = NDArray[np.float32]
Levels = NDArray[np.uint8]

# Rows are worked on this many elements at a time: they stay in a core's cache, and a head needs no copy.
_ELEMENTS = 1 << 17

# How far below the block's extremes the range may end; 4 bits lose more to a wide range than to a clipped
# element. Each is judged by the block's squared error.
_SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)

# Below this a scale's reciprocal overflows float32; such blocks are zero for every purpose.
_SMALLEST_SCALE = np.float32(1e-37)


@dataclass(frozen=True)
class Blocks:
    """A matrix [N, K] of which every `size` elements of a row share a scale.

    Attributes:
        data: uint8 [N, blocks, size * bits / 8], the first element in the low bits; the last block of a row
            is filled up with zeros (of value 0 after dequantization).
        scales: float32 [N, blocks].
        zero_points: uint8 [N, ceil(blocks * bits / 8)], packed as the data; None means 2 ** (bits - 1).
        bits: 8 or 4.
        size: elements of a block.
    """

    data: Levels
    scales: Floats
    zero_points: Levels | None
    bits: int
    size: int


def quantize_blocks(matrix: Floats, bits: int, size: int) -> Blocks:
    """Round float32 [N, K] to `bits`: 8 bits around zero, 4 bits in a range of the block's own.

    The range of 4 bits is the one of least squared error among ranges narrower than the block's extremes,
    and its scale is then the least-squares one for the rounded values.
    """
    rows, width = matrix.shape
    blocks = -(-width // size)
    packed = size * bits // 8
    data = np.empty((rows, blocks, packed), np.uint8)
    scales = np.empty((rows, blocks), np.float32)
    zero_points = None if bits == 8 else np.empty((rows, (blocks + 1) // 2), np.uint8)

    def work(start: int) -> None:
        part = slice(start, start + step)
        x = np.zeros((len(data[part]), blocks * size), np.float32)
        x[:, :width] = matrix[part]
        x = x.reshape(-1, blocks, size)
        if zero_points is None:
            data[part], scales[part] = _eight_bits(x)
            return
        levels, scales[part], zero = _four_bits(x)
        data[part] = levels[..., 0::2] | (levels[..., 1::2] << 4)
        zero = np.pad(zero, ((0, 0), (0, blocks % 2)))
        zero_points[part] = zero[:, 0::2] | (zero[:, 1::2] << 4)

    step = max(1, _ELEMENTS // max(width, 1))
    # numpy lets go of the interpreter's lock on arrays of this size.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, range(0, rows, step)))
    return Blocks(data, scales, zero_points, bits, size)


def _eight_bits(x: Floats) -> tuple[Levels, Floats]:
    """Levels [N, blocks, size] around 128, and scales [N, blocks]."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(127), _SMALLEST_SCALE)
    levels = np.rint(x / scale)
    return (levels + np.float32(128)).astype(np.uint8), _nothing_from_zeros(scale, levels == 0)


def _four_bits(x: Floats) -> tuple[Levels, Floats, Levels]:
    """Levels [N, blocks, size], scales and zero points [N, blocks] of least squared error."""
    low = np.minimum(x.min(-1, keepdims=True), np.float32(0))
    high = np.maximum(x.max(-1, keepdims=True), np.float32(0))
    # In units of each block's range, so that squares of huge or tiny weights are ordinary numbers.
    unit = np.maximum(high - low, _SMALLEST_SCALE * 15)
    x, low = x / unit, low / unit
    # With the least-squares scale the squared error is sum(x^2) - explained.
    best = np.full_like(low, -1.0)
    scale, zero, fitted = np.ones_like(low), np.zeros_like(low), np.ones_like(low)
    for shrink in _SHRINKING:
        new_scale = np.float32(shrink / 15.0)
        new_zero = np.clip(np.rint(low * np.float32(-15.0)), 0, 15)
        centred = _levels(x, new_scale, new_zero)
        centred -= new_zero
        square = np.maximum(np.einsum("nbk,nbk->nb", centred, centred)[..., None], np.float32(1))
        projected = np.einsum("nbk,nbk->nb", x, centred)[..., None]
        explained = projected * projected / square
        better = explained > best
        best = np.where(better, explained, best)
        scale = np.where(better, new_scale, scale)
        zero = np.where(better, new_zero, zero)
        fitted = np.where(better, projected / square, fitted)
    levels = _levels(x, scale, zero)
    scales = _nothing_from_zeros(fitted * unit, levels == zero)
    return levels.astype(np.uint8), scales, zero.squeeze(-1).astype(np.uint8)


def _levels(x: Floats, scale: Floats | np.float32, zero: Floats) -> Floats:
    levels: Floats = x / scale
    levels += zero
    np.rint(levels, out=levels)
    np.clip(levels, 0, 15, out=levels)
    return levels


def _nothing_from_zeros(scale: Floats, zero: NDArray[np.bool_]) -> Floats:
    """Scales [N, blocks] of [N, blocks, 1]: 0 where every element is 0, since kernels add zero points up in
    float32, and that leaves a trace of any other scale."""
    return np.where(zero.all(-1), np.float32(0), scale.squeeze(-1))
