"""Launch choices of the activation kernels, by width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ._launch import power_of_two
from ._tuned import tuned_choice

__all__ = ["PointwiseConfig", "candidates", "choose_pointwise_config"]

# Elements a program by architecture; others take sm_80's. Compiled, not timed.
PROGRAM_ELEMENTS = {
    # 8 values a thread of 4 warps: one 16-byte load of float16, two of float32. sm_90 alike.
    "sm_80": 1024,
    # Twice sm_90's bandwidth a multiprocessor: two loads a thread in flight.
    "sm_100": 2048,
    # Warps of 64 threads: 8 values each.
    "gfx942": 2048,
}
NUM_WARPS = 4


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


@lru_cache(4096)
def choose_pointwise_config(
    width: int, architecture: str = "sm_80", gpu: str | None = None
) -> PointwiseConfig:
    """The launch choices for rows of `width` columns.

    Args:
        width: columns.
        architecture: as `architecture_of` names it.
        gpu: as `gpu_of` names it, whose measured choices go first.
    """
    padded = power_of_two(width)
    tuned = tuned_choice("pointwise", gpu, block_n=padded)
    if tuned is not None:
        return PointwiseConfig(tuned["block_rows"], tuned["block_n"], tuned["num_warps"])
    family = "gfx942" if architecture.startswith("gfx") else architecture
    elements = PROGRAM_ELEMENTS.get(family, PROGRAM_ELEMENTS["sm_80"])
    block_n = min(padded, elements)
    return PointwiseConfig(elements // block_n, block_n, NUM_WARPS)


def candidates(width: int) -> Iterator[PointwiseConfig]:
    """The configurations to measure for a width: 4 to 32 values a thread."""
    padded = power_of_two(width)
    for elements in (512, 1024, 2048, 4096):
        block_n = min(padded, elements)
        for num_warps in (2, 4, 8):
            if 4 <= elements // (32 * num_warps) <= 32:
                yield PointwiseConfig(elements // block_n, block_n, num_warps)
