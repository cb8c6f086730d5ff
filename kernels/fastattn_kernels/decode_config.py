"""Launch choices of the decode kernels: data, by rule or measured, never by timing in a user's call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch

from ._launch import family_of, power_of_two
from ._tuned import tuned_choice

__all__ = ["DecodeConfig", "candidates", "choose_decode_config", "choose_num_splits"]

MAX_SPLITS = 128
# Multiprocessors of the largest GPU of each kind (A100, H100 SXM, B200, MI300X): a plan follows from shapes
# and the architecture alone, and so can be compiled anywhere. On a smaller GPU the surplus of splits waits.
MULTIPROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}


@dataclass(frozen=True)
class DecodeConfig:
    """Tile sizes and parallelism of one launch.

    Attributes:
        block_m: rows a program, queries times the heads of a group: a power of two of at least 16.
        block_n: keys a loop step, a power of two of at least 16.
        num_warps: warps a program.
        num_stages: depth of the software pipeline over key blocks.
        occupancy: programs a multiprocessor is to have: splits are made until there are so many.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    occupancy: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} is {size}; it must be a power of two of at least 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps is {self.num_warps}; it must be 1, 2, 4, 8 or 16")
        for name in ("num_stages", "occupancy"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


# By architecture and padded head size, for contiguous caches of two-byte elements. Compiled, not timed.
# Decoding reads each key once and computes next to nothing, so tiles are what keeps memory busy: two programs
# a multiprocessor with 64 KiB of keys and values under way each, where ~20 KiB in all hide the latency.
HALF_PRECISION = {
    # Two programs in the 163 KiB of sm_80, one in the 99 KiB of sm_86, sm_89 and sm_120.
    "sm_80": {
        64: DecodeConfig(16, 64, 4, 5, 2),
        128: DecodeConfig(16, 64, 4, 3, 2),
        256: DecodeConfig(16, 32, 4, 3, 2),
    },
    # Rows are mostly fewer than wgmma's and tcgen05's 64: warp-level products, which keep up with memory. At
    # 64, 128 keys and a relative bias spill.
    "sm_90": {
        64: DecodeConfig(16, 64, 4, 5, 2),
        128: DecodeConfig(16, 64, 4, 3, 2),
        256: DecodeConfig(16, 32, 4, 3, 2),
    },
    "sm_100": {
        64: DecodeConfig(16, 64, 4, 5, 2),
        128: DecodeConfig(16, 64, 4, 3, 2),
        256: DecodeConfig(16, 32, 4, 3, 2),
    },
    # 64 KiB of shared memory and warps of 64 threads.
    "gfx942": {
        64: DecodeConfig(16, 64, 4, 2, 2),
        128: DecodeConfig(16, 64, 4, 2, 2),
        256: DecodeConfig(16, 32, 4, 2, 2),
    },
}
# Exact float32 products run outside the tensor cores, in tiles that registers bound: at 128, 4 warps spill.
SINGLE_PRECISION = {
    64: DecodeConfig(16, 32, 4, 2, 2),
    128: DecodeConfig(16, 32, 8, 2, 2),
    256: DecodeConfig(16, 16, 8, 2, 2),
}
MAX_BLOCK_M = 64


@cache
def choose_decode_config(
    block_d: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    paged: bool,
    architecture: str,
    rows: int,
    gpu: str | None = None,
) -> DecodeConfig:
    """The launch choices of one call.

    Args:
        block_d: padded head size, the larger of key's and value's.
        dtype: of query.
        cache_dtype: of the caches: query's, int8 or float8_e4m3fn.
        paged: whether keys are found through a table of pages.
        architecture: as `architecture_of` names it.
        rows: queries times the heads of a group.
        gpu: as `gpu_of` names it; what was measured on it goes before the table.
    """
    size = max(64, block_d)
    single = dtype == torch.float32
    block_m = min(power_of_two(rows, least=16), 32 if single else MAX_BLOCK_M)
    measured = tuned_choice(
        "decode_attention",
        gpu,
        block_d=size,
        dtype=dtype,
        cache_dtype=cache_dtype,
        paged=paged,
        block_m=block_m,
    )
    if measured is not None:
        return DecodeConfig(**(measured | {"block_m": block_m}))
    config = SINGLE_PRECISION[size] if single else HALF_PRECISION[family_of(architecture)][size]
    quantized = cache_dtype.itemsize < dtype.itemsize
    num_warps, num_stages = config.num_warps, config.num_stages
    # At 128, 4 warps spill with more rows, and on Triton 3.9 with page numbers or conversions in registers.
    if block_m > 16 or (size == 128 and (paged or quantized) and not architecture.startswith("gfx")):
        num_warps = 8
    if quantized:
        # As many bytes under way in smaller elements.
        num_stages += 1
    if paged:
        # The compiler halves the stages' distance between a load of keys and their use where the load of a
        # page goes before it.
        num_stages = 2 * num_stages - 1
    return replace(config, block_m=block_m, num_warps=num_warps, num_stages=num_stages)


def choose_num_splits(programs: int, max_keys: int, config: DecodeConfig, architecture: str) -> int:
    """How many splits each sequence's keys are cut into: as few as fill the GPU.

    Args:
        programs: programs without splitting: sequences x key heads x blocks of rows.
        max_keys: what the cache can hold a sequence. Its length is on the GPU, and not waited for.
        config: the launch choices.
        architecture: as `architecture_of` names it.
    """
    wanted = config.occupancy * MULTIPROCESSORS[family_of(architecture)]
    # Two blocks of keys a split at least: below that the reduction costs more than it saves.
    most = min(MAX_SPLITS, max_keys // (2 * config.block_n))
    # Rounded down: a few programs more than fit at once would run alone in a second round.
    return max(1, min(most, wanted // max(programs, 1)))


def candidates(
    block_d: int, dtype: torch.dtype, cache_dtype: torch.dtype, paged: bool, architecture: str, rows: int
) -> list[DecodeConfig]:
    """The configurations worth measuring, the heuristic's first; those that exceed shared memory fail to
    launch.
    """
    chosen = choose_decode_config(block_d, dtype, cache_dtype, paged, architecture, rows)
    others = (
        replace(chosen, block_n=block_n, num_warps=num_warps, num_stages=num_stages, occupancy=occupancy)
        for block_n, num_warps, num_stages, occupancy in product(
            (32, 64, 128), (4, 8), (chosen.num_stages, chosen.num_stages + 2), (1, 2, 3, 4)
        )
        if block_n * max(64, block_d) <= 128 * 128
    )
    return [chosen, *(config for config in others if config != chosen)]
