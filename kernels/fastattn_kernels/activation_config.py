"""Launch choices of the pointwise kernels, by width."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PointwiseConfig", "choose_pointwise_config"]

# 8 values a thread of 4 warps: one 16-byte load of float16, two of float32.
PROGRAM_ELEMENTS = 1024


@dataclass(frozen=True)
class PointwiseConfig:
    """The tile of one program.

    Attributes:
        block_rows: rows, a power of two.
        block_n: columns, a power of two.
        num_warps: warps a program.
    """

    block_rows: int
    block_n: int
    num_warps: int

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_n", "num_warps"):
            number = getattr(self, name)
            if number < 1 or number & (number - 1):
                raise ValueError(f"{name} is {number}; it must be a power of two")


def choose_pointwise_config(width: int) -> PointwiseConfig:
    """The launch choices for rows of `width` columns."""
    block_n = min(1 << max(width - 1, 0).bit_length(), PROGRAM_ELEMENTS)
    return PointwiseConfig(PROGRAM_ELEMENTS // block_n, block_n, num_warps=4)
