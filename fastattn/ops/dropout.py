"""Counter-based dropout: the mask of an element is a hash of (seed, row, column), so it can be recomputed
anywhere.

The kernels compute the same bits (kernels/fastattn_kernels/_dropout.py). The hash is lowbias32, a 32-bit
multiply-xorshift mixer: two multiplications an element, against ten Philox rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["keep_mask"]

_LOW_32 = 0xFFFFFFFF


def _as_int32(bits: int) -> int:
    """The int32 whose two's complement is `bits`."""
    return bits - (1 << 32) if bits >= 1 << 31 else bits


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int32."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on int32, whose multiplication wraps as uint32's does."""
    x = (x ^ _shift_right(x, 16)) * _as_int32(0x7FEB352D)
    x = (x ^ _shift_right(x, 15)) * _as_int32(0x846CA68B)
    return x ^ _shift_right(x, 16)


def _words(x: Tensor) -> tuple[Tensor, Tensor]:
    """The low and high 32 bits of int64, as int32."""
    low = x & _LOW_32
    low = torch.where(low >= 1 << 31, low - (1 << 32), low)
    return low.to(torch.int32), (x >> 32).to(torch.int32)


def keep_mask(seed: Tensor, rows: Tensor, columns: int, dropout_p: float) -> Tensor:
    """Which elements survive dropout.

    Args:
        seed: int64 [1].
        rows: int64 [...], the row index of each row.
        columns: number of columns.
        dropout_p: probability of dropping an element, in [0, 1].

    Returns:
        bool [..., columns], True = keep.
    """
    seed_low, seed_high = _words(seed)
    row_low, row_high = _words(rows)
    row_key = _mix(_mix(seed_low ^ row_low) + seed_high + row_high)
    column = torch.arange(columns, dtype=torch.int32, device=rows.device)
    bits = _mix(row_key[..., None] ^ column)
    threshold = min(int(dropout_p * 2**32), _LOW_32)
    # Unsigned comparison on signed integers: flip the sign bit of both sides.
    return (bits ^ _as_int32(1 << 31)) >= _as_int32(threshold ^ (1 << 31))
