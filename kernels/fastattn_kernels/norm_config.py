"""Launch choices of the kernels that take whole rows, norms and softmax, by width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from ._launch import family_of, power_of_two
from ._tuned import tuned_choice

__all__ = ["NormConfig", "candidates", "choose_norm_config"]

# More rows than this a program would only be more of the same.
MAX_BLOCK_ROWS = 32


@dataclass(frozen=True)
class NormConfig:
    """How rows are laid over programs.

    Attributes:
        block_rows: rows a program, a power of two.
        block_n: columns a step, a power of two; at least the width unless `loop`.
        loop: whether a row takes several steps.
        num_warps: warps a program.
    """

    block_rows: int
    block_n: int
    loop: bool
    num_warps: int

    def __post_init__(self) -> None:
        for name in ("block_rows", "block_n", "num_warps"):
            number = getattr(self, name)
            if number < 1 or number & (number - 1):
                raise ValueError(f"{name} is {number}; it must be a power of two")
        if self.loop and self.block_rows != 1:
            raise ValueError(f"block_rows is {self.block_rows}; a loop over columns takes 1")


@dataclass(frozen=True)
class NormLimits:
    """What an architecture's launches are made from. Compiled, not timed: nothing here spills.

    Attributes:
        row_bytes: the widest row kept in registers; wider ones loop.
        program_elements: elements a program where rows are small: enough loads in flight to cover memory
            latency, few enough programs' worth of small rows to launch.
        warp_elements: elements a warp: 16 a thread are two 16-byte loads of half precision.
        max_warps: warps a program.
        loop_block_n: columns a step of a loop.
    """

    row_bytes: int
    program_elements: int
    warp_elements: int
    max_warps: int
    loop_block_n: int


LIMITS = {
    # A row of 32 KiB fits in the registers of 16 warps; at twice that, float32 rows with dropout spill.
    "sm_80": NormLimits(32768, 2048, 512, 16, 8192),
    # As sm_80. 3.35 TB/s at half a microsecond of latency are 13 KiB in flight a multiprocessor, which two
    # programs of 2048 elements of two tensors have.
    "sm_90": NormLimits(32768, 2048, 512, 16, 8192),
    # Twice the bandwidth of sm_90 a multiprocessor, so twice in flight.
    "sm_100": NormLimits(32768, 4096, 512, 16, 8192),
    # Warps of 64 threads, and 16 of them at most: the same 16 elements a thread.
    "gfx942": NormLimits(32768, 4096, 1024, 16, 8192),
}


@lru_cache(4096)
def choose_norm_config(
    rows: int,
    width: int,
    element_bytes: int,
    architecture: str = "sm_80",
    gpu: str | None = None,
    op: str = "norm",
) -> NormConfig:
    """The launch choices for `rows` rows of `width` columns of elements of `element_bytes`.

    Args:
        rows: 32 stands for more.
        width: columns.
        element_bytes: size of an element.
        architecture: as `architecture_of` names it.
        gpu: as `gpu_of` names it, whose measured choices go first.
        op: whose measured choices: "norm" or "softmax".
    """
    block_n = power_of_two(width)
    tuned = tuned_choice(op, gpu, block_n=block_n, element_bytes=element_bytes)
    if tuned is not None:
        loop = bool(tuned["loop"])
        block_rows = 1 if loop else _block_rows(rows, tuned["block_rows"])
        return NormConfig(block_rows, tuned["block_n"] if loop else block_n, loop, tuned["num_warps"])
    limits = LIMITS[family_of(architecture)]
    if block_n * element_bytes > limits.row_bytes:
        return NormConfig(1, limits.loop_block_n, loop=True, num_warps=limits.max_warps)
    # Several small rows a program: one row of 128 would leave a warp with a single load in flight.
    block_rows = _block_rows(rows, max(1, limits.program_elements // block_n))
    num_warps = min(max(block_rows * block_n // limits.warp_elements, 1), limits.max_warps)
    return NormConfig(block_rows, block_n, loop=False, num_warps=num_warps)


def _block_rows(rows: int, wanted: int) -> int:
    """`wanted`, but never more than there are."""
    return min(wanted, power_of_two(rows), MAX_BLOCK_ROWS)


def candidates(width: int, element_bytes: int) -> Iterator[NormConfig]:
    """The configurations to measure for a width: what the registers of a program hold, and loops."""
    block_n = power_of_two(width)
    if block_n * element_bytes <= 65536:
        for block_rows in (1, 2, 4, 8, 16, 32):
            elements = block_rows * block_n
            for num_warps in (1, 2, 4, 8, 16):
                # 4 to 64 elements a thread of 32; fewer only where there are no more.
                each = elements // num_warps
                if (
                    (block_rows == 1 or elements <= 16384)
                    and each <= 2048
                    and (each >= 128 or num_warps == 1)
                ):
                    yield NormConfig(block_rows, block_n, loop=False, num_warps=num_warps)
    for loop_block_n in (2048, 4096, 8192):
        if loop_block_n < block_n:
            for num_warps in (4, 8, 16):
                yield NormConfig(1, loop_block_n, loop=True, num_warps=num_warps)
