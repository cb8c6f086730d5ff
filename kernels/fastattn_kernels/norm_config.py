"""Launch choices of the norm kernels, by width."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NormConfig", "choose_norm_config"]

# A row of this many bytes fits in the registers of 16 warps; at twice that, float32 rows with dropout spill
# on sm_80. Wider rows take a loop. 16 warps of 64 threads are the most a program may have on AMD.
MAX_ROW_BYTES = 32768
LOOP_BLOCK_N = 8192
# Elements a program: enough loads in flight to cover memory latency, few enough programs' worth of small rows
# to launch.
PROGRAM_ELEMENTS = 2048


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


def choose_norm_config(rows: int, width: int, element_bytes: int) -> NormConfig:
    """The launch choices for `rows` rows of `width` columns of elements of `element_bytes`."""
    block_n = 1 << max(width - 1, 0).bit_length()
    if block_n * element_bytes > MAX_ROW_BYTES:
        return NormConfig(block_rows=1, block_n=LOOP_BLOCK_N, loop=True, num_warps=16)
    # Several small rows a program: one row of 128 would leave a warp with a single load in flight. Never more
    # than there are.
    block_rows = min(max(1, PROGRAM_ELEMENTS // block_n), 1 << max(rows - 1, 0).bit_length(), 16)
    # 16 values a thread of 32 at small sizes, 32 at the widest: 16-byte loads either way.
    num_warps = min(max(block_rows * block_n // 512, 1), 16)
    return NormConfig(block_rows, block_n, loop=False, num_warps=num_warps)
