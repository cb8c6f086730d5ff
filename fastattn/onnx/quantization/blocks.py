"""Weights in blocks of 8 or 4 bits along the inputs, as MatMulNBits and GatherBlockQuantized store them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Blocks", "quantize_blocks"]

# Rows are worked on this many elements at a time: they stay in the cache, and a head needs no second copy.
_ELEMENTS = 1 << 18

# How far below the block's extremes the range may end; 4 bits lose more to a wide range than to a clipped
# element. Searched in steps, each judged by the block's squared error.
_SHRINKING = tuple(1.0 - 0.04 * step for step in range(9))

# Below this a scale's reciprocal overflows float32; such blocks are zero for every purpose.
_SMALLEST_SCALE = 1e-37


@dataclass(frozen=True)
class Blocks:
    """A matrix [N, K] of which every `size` elements of a row share a scale.

    Attributes:
        data: uint8 [N, blocks, size * bits / 8], the first element in the low bits; the last block of a row
            is filled up with zeros (of value 0 after dequantization).
        scales: float32 [N, blocks].
        zero_points: uint8 [N, ceil(blocks * bits / 8)], packed as the data; None means 2 ** (bits - 1).
    """

    data: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    bits: int
    size: int


def quantize_blocks(matrix: Tensor, bits: int, size: int) -> Blocks:
    """Round float32 [N, K] to `bits`: 8 bits around zero, 4 bits in a range of the block's own.

    The range of 4 bits is the one of least squared error among ranges narrower than the block's extremes,
    and its scale is then the least-squares one for the rounded values.
    """
    width = matrix.shape[1]
    step = max(1, _ELEMENTS // max(width, 1))
    parts = [_rows(matrix[start : start + step], bits, size) for start in range(0, matrix.shape[0], step)]
    data, scales, zero_points = zip(*parts, strict=True)
    joined = None if zero_points[0] is None else np.concatenate(zero_points)
    return Blocks(np.concatenate(data), np.concatenate(scales), joined, bits, size)


def _rows(matrix: Tensor, bits: int, size: int) -> tuple[Any, Any, Any]:
    rows, width = matrix.shape
    blocks = -(-width // size)
    padded = torch.nn.functional.pad(matrix, (0, blocks * size - width)).view(rows, blocks, size)
    if bits == 8:
        scale = (padded.abs().amax(-1, keepdim=True) / 127.0).clamp(min=_SMALLEST_SCALE)
        levels = (padded / scale).round_().clamp_(-127, 127).add_(128)
        return levels.to(torch.uint8).numpy(), _nothing_from_zeros(scale, levels == 128).numpy(), None
    levels, scale, zero = _four_bits(padded)
    packed = levels[..., 0::2] | (levels[..., 1::2] << 4)
    zero = torch.nn.functional.pad(zero, (0, blocks % 2))
    return packed.numpy(), scale.numpy(), (zero[:, 0::2] | (zero[:, 1::2] << 4)).numpy()


def _four_bits(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Levels uint8 [N, blocks, size], scales [N, blocks] and zero points uint8 [N, blocks] of least error."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    # With the least-squares scale the squared error is sum(x^2) - explained.
    best = torch.full_like(low, -1.0)
    best_scale, best_zero, fitted = torch.ones_like(low), torch.zeros_like(low), torch.ones_like(low)
    for shrink in _SHRINKING:
        scale = ((high - low) * (shrink / 15.0)).clamp(min=_SMALLEST_SCALE)
        zero = (low * -shrink / scale).round_().clamp_(0, 15)
        centred = _levels(x, scale, zero).sub_(zero)
        projected = (x * centred).sum(-1, keepdim=True)
        square = centred.square_().sum(-1, keepdim=True)
        explained = projected.square() / square.clamp(min=1)
        better = explained > best
        best = torch.where(better, explained, best)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
        fitted = torch.where(better, projected / square.clamp(min=1), fitted)
    levels = _levels(x, best_scale, best_zero).to(torch.uint8)
    return levels, _nothing_from_zeros(fitted, levels == best_zero), best_zero.squeeze(-1).to(torch.uint8)


def _nothing_from_zeros(scale: Tensor, zero: Tensor) -> Tensor:
    """Scales [N, blocks] of scales [N, blocks, 1]: 0 where every element is, since kernels add zero points
    up in float32 and leave a trace of a scale above 0."""
    return torch.where(zero.all(-1), 0.0, scale.squeeze(-1))


def _levels(x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (x / scale).add_(zero).round_().clamp_(0, 15)
