"""Launch choices of the attention kernel: data picked by rule, never by timing in a user's call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from ._launch import family_of
from ._tuned import tuned_choice

__all__ = [
    "MAX_HEAD_DIM",
    "AttentionConfig",
    "candidates",
    "choose_attention_config",
    "max_registers",
    "tuning_key",
]

MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class AttentionConfig:
    """Tile sizes and parallelism of one launch.

    Attributes:
        block_m: queries a program, a power of two of at least 16.
        block_n: keys a loop step, a power of two of at least 16.
        num_warps: warps a program.
        num_stages: depth of the software pipeline over key blocks.
        descriptors: whether query, key and value are read through tensor descriptors (TMA).
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} is {size}; it must be a power of two of at least 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps is {self.num_warps}; it must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"num_stages is {self.num_stages}; it must be at least 1")


# By architecture and padded head size: the launch of plain scores, and that of crowded ones (1, see
# `choose_attention_config`). Compiled, not timed: the largest tiles that do not spill.
HALF_PRECISION: dict[str, dict[int, tuple[AttentionConfig, AttentionConfig]]] = {
    # 4 warps spill at 128 x 64, as do 64 keys at 128 wide heads. All fit the 99 KiB of sm_86, sm_89 and
    # sm_120, too.
    "sm_80": {
        64: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 32, 8, 3)),
        128: (AttentionConfig(128, 32, 8, 3), AttentionConfig(128, 32, 8, 2)),
        256: (AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 32, 8, 2)),
    },
    # Two warpgroups, so that one's softmax overlaps the other's wgmma. At 128, the addresses of 128 keys
    # spill.
    "sm_90": {
        64: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 8, 3)),
        128: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 32, 8, 3)),
        256: (AttentionConfig(128, 64, 8, 2), AttentionConfig(128, 32, 8, 2)),
    },
    # tcgen05; 4 warps spill.
    "sm_100": {
        64: (AttentionConfig(128, 32, 8, 3), AttentionConfig(128, 64, 8, 3)),
        128: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 32, 8, 3)),
        256: (AttentionConfig(128, 32, 8, 2), AttentionConfig(128, 32, 8, 2)),
    },
    # 64 KiB of shared memory and warps of 64 threads. At 128, 64 keys and two stages spill on Triton 3.9.
    "gfx942": {
        64: (AttentionConfig(128, 64, 4, 2), AttentionConfig(128, 64, 4, 2)),
        128: (AttentionConfig(128, 32, 4, 2), AttentionConfig(128, 32, 8, 1)),
        256: (AttentionConfig(64, 32, 8, 2), AttentionConfig(64, 32, 8, 2)),
    },
}
# The same through tensor descriptors, where addresses take no registers. On sm_80, which has no TMA, and in
# AMD's compiler they cost more than pointers. On sm_100, 128 keys spill on Triton 3.9 under an unaligned
# padding mask.
DESCRIBED: dict[str, dict[int, tuple[AttentionConfig, AttentionConfig]]] = {
    "sm_90": {
        64: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 8, 3)),
        128: (AttentionConfig(128, 128, 8, 2), AttentionConfig(128, 64, 8, 3)),
        256: (AttentionConfig(128, 64, 8, 2), AttentionConfig(128, 32, 8, 2)),
    },
    "sm_100": {
        64: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 8, 3)),
        128: (AttentionConfig(128, 64, 8, 3), AttentionConfig(128, 64, 8, 2)),
        256: (AttentionConfig(128, 32, 8, 2), AttentionConfig(128, 32, 8, 2)),
    },
}
# Masks and biases that come by single elements, an address each, or several of them (crowded 2): few keys a
# step.
CROWDED = {
    "sm_80": AttentionConfig(32, 16, 4, 1),
    "sm_90": AttentionConfig(128, 16, 8, 2),
    "sm_100": AttentionConfig(128, 16, 8, 2),
    "gfx942": AttentionConfig(64, 16, 4, 1),
}
# Exact float32 products run outside the tensor cores, in tiles that registers bound, not bandwidth: at 128,
# 32 keys or 4 warps spill on sm_90. Fewer than 64 queries: at 64 Triton 3.7.1 takes tcgen05, and so TF32, on
# sm_100 whatever precision is asked for.
SINGLE_PRECISION = {
    64: AttentionConfig(32, 16, 4, 2),
    128: AttentionConfig(32, 16, 8, 3),
    256: AttentionConfig(32, 16, 8, 2),
}


def max_registers(architecture: str, num_warps: int) -> int | None:
    """Registers to grant a thread; None where the compiler's own choice is right.

    From sm_90 up ptxas holds some of these kernels to 80 or 128 a thread, in the hope of a second program on
    the multiprocessor, and spills a few bytes for it. One program of 8 warps may have all 255.
    """
    return 255 if family_of(architecture) in DESCRIBED and num_warps <= 8 else None


@cache
def choose_attention_config(
    block_d: int,
    dtype: torch.dtype,
    architecture: str,
    query_block: int,
    crowded: int,
    describable: bool = False,
    gpu: str | None = None,
) -> AttentionConfig:
    """The launch choices of one call: those measured on this GPU, else the table's.

    Args:
        block_d: padded head size, the larger of key's and value's.
        dtype: of query, key and value.
        architecture: as `architecture_of` names it.
        query_block: the power of two, at least 16, that holds the most queries a sequence has.
        crowded: what joins the scores in registers and shared memory: 0 nothing much; 1 a mask, a relative
            bias, ALiBi, dropout or a bias per query; 2 several that are loaded, or a mask or bias per query
            whose rows begin anywhere, so that it comes by single elements.
        describable: whether tensor descriptors can describe query, key and value.
        gpu: as `gpu_of` names it.
    """
    key = tuning_key(block_d, dtype, query_block, crowded, describable)
    measured: dict[str, Any] | None = tuned_choice("attention", gpu, **key)
    if measured is not None:
        return AttentionConfig(**measured)
    size = max(64, block_d)
    family = family_of(architecture)
    if dtype == torch.float32:
        config = SINGLE_PRECISION[size]
    elif crowded == 2:
        config = CROWDED[family]
    elif describable and family in DESCRIBED:
        config = replace(DESCRIBED[family][size][crowded], descriptors=True)
    else:
        config = HALF_PRECISION[family][size][crowded]
    # Few queries (a packed batch's pooled tokens, short cross attention) would leave most of a tall tile
    # empty.
    if query_block < config.block_m:
        # The warps share the keys then: at wide heads 64 of them spill on sm_90 and sm_80.
        keys = min(config.block_n, 64 if size <= 64 else 32)
        config = replace(
            config,
            block_m=query_block,
            block_n=keys,
            num_warps=min(config.num_warps, 4),
            descriptors=False,
        )
    return config


def tuning_key(
    block_d: int, dtype: torch.dtype, query_block: int, crowded: int, describable: bool
) -> dict[str, object]:
    """What measured choices are found by; all lengths from 128 queries on are one."""
    return dict(
        block_d=max(64, block_d),
        dtype=dtype,
        query_block=min(query_block, 128),
        crowded=int(crowded),
        describable=describable,
    )


def candidates(
    block_d: int, dtype: torch.dtype, query_block: int, describable: bool
) -> list[AttentionConfig]:
    """The configurations worth measuring; those that do not fit a GPU fail to launch and drop out."""
    keys = (16, 32) if dtype == torch.float32 else (32, 64, 128) if block_d <= 128 else (16, 32, 64)
    heights = (16, 32) if dtype == torch.float32 else (16, 32, 64, 128)
    rows = [size for size in heights if size <= query_block and (size >= 32 or query_block < 64)]
    return [
        AttentionConfig(block_m, block_n, num_warps, num_stages, descriptors)
        for block_m in rows
        for block_n in keys
        for num_warps in (4, 8)
        for num_stages in (1, 2, 3)
        for descriptors in ((False, True) if describable and dtype != torch.float32 else (False,))
    ]
