"""Launch choices are valid for every size, and say what is wrong when they are not."""

from collections.abc import Callable

import pytest
import torch
from fastattn_kernels.activation_config import PointwiseConfig, choose_pointwise_config
from fastattn_kernels.attention_config import AttentionConfig, choose_attention_config
from fastattn_kernels.norm_config import NormConfig, choose_norm_config

ARCHITECTURES = [
    "sm_80",
    "sm_86",
    "sm_89",
    "sm_90",
    "sm_100",
    "sm_103",
    "sm_120",
    "gfx942",
    "gfx950",
    "gfx90a",
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_head_size_has_a_launch(architecture: str, dtype: torch.dtype) -> None:
    for block_d in (16, 32, 64, 128, 256):
        for crowded in (False, True):
            full = choose_attention_config(block_d, dtype, architecture, 4096, crowded)
            assert full.block_m >= 32
            for query_block in (16, 32, 64):
                few = choose_attention_config(block_d, dtype, architecture, query_block, crowded)
                assert few.block_m == min(full.block_m, query_block)


def test_consumer_gpus_take_tiles_that_fit_their_shared_memory() -> None:
    # sm_120 has the number of a Blackwell, and neither its tensor memory nor its 227 KiB.
    for architecture in ("sm_86", "sm_89", "sm_120"):
        for size in (64, 128, 256):
            assert choose_attention_config(
                size, torch.float16, architecture, 4096, False
            ) == choose_attention_config(size, torch.float16, "sm_80", 4096, False)


def test_float32_tiles_stay_under_tcgen05() -> None:
    # At 64 rows Triton 3.7.1 takes tcgen05, and so TF32, on sm_100 even for input_precision="ieee".
    for size in (16, 64, 128, 256):
        assert choose_attention_config(size, torch.float32, "sm_100", 4096, False).block_m < 64


@pytest.mark.parametrize("element_bytes", [2, 4])
def test_every_width_is_covered_by_a_norm_launch(element_bytes: int) -> None:
    for width in [*range(1, 70), 384, 768, 4096, 8192, 8193, 16384, 16385, 65536]:
        for rows in (1, 3, 4096):
            config = choose_norm_config(rows, width, element_bytes)
            assert config.loop or config.block_n >= width
            assert config.block_rows < 2 * rows
            # What a program may have on AMD, whose warps have 64 threads.
            assert config.num_warps * 64 <= 1024


def test_pointwise_tiles_do_not_exceed_their_row() -> None:
    for width in (1, 7, 384, 1024, 1025, 50000):
        config = choose_pointwise_config(width)
        assert config.block_n < 2 * width and config.block_rows * config.block_n == 1024


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AttentionConfig(96, 64, 4, 2), "block_m is 96; it must be a power of two"),
        (lambda: AttentionConfig(64, 8, 4, 2), "block_n is 8; it must be a power of two of at least 16"),
        (lambda: AttentionConfig(64, 64, 3, 2), "num_warps is 3; it must be 1, 2, 4, 8 or 16"),
        (lambda: AttentionConfig(64, 64, 4, 0), "num_stages is 0"),
        (lambda: NormConfig(3, 64, False, 4), "block_rows is 3"),
        (lambda: NormConfig(2, 64, True, 4), "a loop over columns takes 1"),
        (lambda: PointwiseConfig(1, 100, 4), "block_n is 100"),
    ],
)
def test_invalid_choices_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
