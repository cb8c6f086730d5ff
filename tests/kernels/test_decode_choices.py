"""Launch choices of decoding: valid for every size, splits enough to fill a GPU and no more than keys."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastattn_kernels.decode_config import (
    DecodeConfig,
    candidates,
    choose_decode_config,
    choose_num_splits,
)

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
HALF, INT8 = torch.float16, torch.int8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_size_has_a_launch_whose_rows_hold_a_group(architecture: str, dtype: torch.dtype) -> None:
    for block_d in (16, 64, 128, 256):
        for cache_dtype in (dtype, INT8, torch.float8_e4m3fn):
            for rows in (1, 8, 16, 17, 48, 1136):
                config = choose_decode_config(block_d, dtype, cache_dtype, True, architecture, rows)
                assert min(rows, 32) <= config.block_m <= max(16, 2 * rows)


def test_float32_rows_stay_under_tcgen05() -> None:
    # At 64 rows Triton 3.7.1 takes tcgen05, and so TF32, on sm_100 even for input_precision="ieee".
    single = torch.float32
    assert choose_decode_config(128, single, single, False, "sm_100", 1000).block_m < 64


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_splits_fill_the_gpu_and_never_outnumber_the_keys(architecture: str) -> None:
    config = choose_decode_config(128, HALF, HALF, False, architecture, 8)
    assert choose_num_splits(8, 2**17, config, architecture) * 8 >= 100, "one sequence must not leave it idle"
    assert choose_num_splits(4096, 2**17, config, architecture) == 1, "a full GPU gains nothing from splits"
    for max_keys in (0, 1, config.block_n, 2 * config.block_n, 1000):
        splits = choose_num_splits(1, max_keys, config, architecture)
        assert 1 <= splits <= max(1, max_keys // config.block_n)


def test_what_was_measured_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = dict(block_d=128, dtype="float16", cache_dtype="int8", paged=True, block_m=16)
    choice = dict(block_n=32, num_warps=2, num_stages=6, occupancy=3)
    content = {"gpu": "some-gpu", "ops": {"decode_attention": [{"key": key, "choice": choice}]}}
    (tmp_path / "some-gpu.json").write_text(json.dumps(content))
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path))
    measured = choose_decode_config(128, HALF, INT8, True, "sm_90", 5, gpu="some-gpu")
    assert measured == DecodeConfig(block_m=16, **choice)
    other = choose_decode_config(128, HALF, INT8, False, "sm_90", 5, gpu="some-gpu")
    assert other == choose_decode_config(128, HALF, INT8, False, "sm_90", 5)


def test_candidates_start_with_the_heuristic_and_do_not_repeat() -> None:
    found = candidates(128, HALF, INT8, True, "sm_90", 8)
    assert found[0] == choose_decode_config(128, HALF, INT8, True, "sm_90", 8)
    assert len(set(found)) == len(found) > 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DecodeConfig(24, 64, 4, 2, 2), "block_m is 24; it must be a power of two of at least 16"),
        (lambda: DecodeConfig(16, 8, 4, 2, 2), "block_n is 8"),
        (lambda: DecodeConfig(16, 64, 3, 2, 2), "num_warps is 3; it must be 1, 2, 4, 8 or 16"),
        (lambda: DecodeConfig(16, 64, 4, 0, 2), "num_stages is 0"),
        (lambda: DecodeConfig(16, 64, 4, 2, 0), "occupancy is 0; it must be at least 1"),
    ],
)
def test_invalid_choices_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
