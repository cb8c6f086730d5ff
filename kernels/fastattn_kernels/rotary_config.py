"""Launch choices of the rotary kernel, by heads and rotated width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ._launch import power_of_two
from ._tuned import tuned_choice

__all__ = ["RotaryConfig", "candidates", "choose_rotary_config"]

# Elements of a tile by architecture; others take sm_80's. 16 a thread are a pair of 16-byte loads of float16.
# Compiled, not timed: nothing spills, and cosines and sines of a token stay in registers for all its heads.
TILE_ELEMENTS = {
    # sm_90 alike: 8 KiB in flight a program of float16.
    "sm_80": 2048,
    # Twice sm_90's bandwidth a multiprocessor, so twice in flight.
    "sm_100": 4096,
    # Warps of 64 threads.
    "gfx942": 4096,
}


@dataclass(frozen=True)
class RotaryConfig:
    """The tile of one step; a program is one token.

    Attributes:
        block_heads: heads a step, a power of two.
        num_warps: warps a program.
    """

    block_heads: int
    num_warps: int

    def __post_init__(self) -> None:
        for name in ("block_heads", "num_warps"):
            number = getattr(self, name)
            if number < 1 or number & (number - 1):
                raise ValueError(f"{name} is {number}; it must be a power of two")


@lru_cache(4096)
def choose_rotary_config(
    heads: int, block_d: int, architecture: str = "sm_80", gpu: str | None = None
) -> RotaryConfig:
    """The launch choices for tokens of `heads` heads.

    Args:
        heads: of the query.
        block_d: columns of the wider tile, rotated or passed, a power of two.
        architecture: as `architecture_of` names it.
        gpu: as `gpu_of` names it, whose measured choices go first.
    """
    padded = power_of_two(heads)
    tuned = tuned_choice("rotary", gpu, heads=padded, block_d=block_d)
    if tuned is not None:
        return RotaryConfig(tuned["block_heads"], tuned["num_warps"])
    family = "gfx942" if architecture.startswith("gfx") else architecture
    elements = TILE_ELEMENTS.get(family, TILE_ELEMENTS["sm_80"])
    block_heads = min(padded, max(1, elements // block_d))
    threads = 64 if family == "gfx942" else 32
    return RotaryConfig(block_heads, min(max(block_heads * block_d // (16 * threads), 1), 8))


def candidates(heads: int, block_d: int) -> Iterator[RotaryConfig]:
    """The configurations to measure: 4 to 32 values a thread."""
    padded = power_of_two(heads)
    for block_heads in (1, 2, 4, 8, 16, 32, 64):
        if block_heads <= padded and (block_heads * block_d <= 8192 or block_heads == 1):
            for num_warps in (1, 2, 4, 8):
                each = block_heads * block_d // (32 * num_warps)
                if each <= 32 and (each >= 4 or num_warps == 1):
                    yield RotaryConfig(block_heads, num_warps)
