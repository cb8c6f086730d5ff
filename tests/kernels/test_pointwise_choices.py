"""Launch choices of norms, softmax, activations and rotary: by architecture, measured, and to be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fastattn_kernels import activation_config, norm_config, rotary_config
from fastattn_kernels.activation_config import PointwiseConfig, choose_pointwise_config
from fastattn_kernels.norm_config import NormConfig, choose_norm_config
from fastattn_kernels.rotary_config import RotaryConfig, choose_rotary_config

ARCHITECTURES = pytest.mark.parametrize(
    "architecture", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx90a"]
)
WIDTHS = [*range(1, 70), 384, 768, 4096, 8192, 8193, 16384, 16385, 65536]


def threads(architecture: str) -> int:
    """Of a warp."""
    return 64 if architecture.startswith("gfx") else 32


@ARCHITECTURES
def test_rows_of_every_width(architecture: str) -> None:
    for width in WIDTHS:
        for element_bytes in (2, 4):
            for rows in (1, 3, 32):
                config = choose_norm_config(rows, width, element_bytes, architecture)
                assert config.loop or config.block_n >= width
                assert config.block_rows < 2 * rows
                assert config.num_warps * threads(architecture) <= 1024
                if not config.loop:
                    # Float32 values a thread keeps: what no architecture spilled.
                    elements = config.block_rows * config.block_n
                    assert elements <= 32 * config.num_warps * threads(architecture)


@ARCHITECTURES
def test_tiles_of_every_width(architecture: str) -> None:
    for width in WIDTHS:
        config = choose_pointwise_config(width, architecture)
        assert config.block_n < 2 * width
        assert config.block_rows * config.block_n <= 16 * config.num_warps * threads(architecture)


@ARCHITECTURES
def test_heads_of_every_size(architecture: str) -> None:
    for heads in (1, 3, 8, 32, 71, 128):
        for block_d in (2, 16, 64, 128, 256, 512):
            config = choose_rotary_config(heads, block_d, architecture)
            assert config.block_heads < 2 * heads
            tile = config.block_heads * block_d
            assert tile <= max(4096, block_d) and config.num_warps <= 8


def test_candidates_fit_what_they_are_for() -> None:
    for width in (1, 64, 768, 4096, 8192, 16384, 32768, 65536):
        for element_bytes in (2, 4):
            found = list(norm_config.candidates(width, element_bytes))
            assert len(found) == len(set(found)) > 0
            assert all(config.loop or config.block_n >= width for config in found)
            assert any(config.loop for config in found) or width <= 2048
        tiles = list(activation_config.candidates(width))
        assert len(tiles) == len(set(tiles)) > 0
        assert all(tile.block_n < 2 * width for tile in tiles)
    for heads, size in ((1, 64), (12, 64), (32, 128), (71, 256)):
        steps = list(rotary_config.candidates(heads, size))
        assert len(steps) == len(set(steps)) > 0 and all(step.block_heads < 2 * heads for step in steps)


def test_the_heuristic_is_among_the_candidates() -> None:
    # So that measuring can only gain.
    for width in (256, 768, 4096, 16384):
        assert choose_norm_config(32, width, 2, "sm_90") in norm_config.candidates(width, 2)
        assert choose_pointwise_config(width, "sm_90") in activation_config.candidates(width)
    for heads, size in ((32, 128), (16, 64)):
        assert choose_rotary_config(heads, size, "sm_90") in rotary_config.candidates(heads, size)


def test_measured_choices_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"block_rows": 4, "block_n": 1024, "loop": 0, "num_warps": 8}
    loop = {"block_rows": 1, "block_n": 2048, "loop": 1, "num_warps": 8}
    ops = {
        "norm": [{"key": {"block_n": 1024, "element_bytes": 2}, "choice": rows}],
        "softmax": [{"key": {"block_n": 1024, "element_bytes": 2}, "choice": loop}],
        "pointwise": [
            {"key": {"block_n": 1024}, "choice": {"block_rows": 2, "block_n": 512, "num_warps": 8}}
        ],
        "rotary": [{"key": {"heads": 16, "block_d": 64}, "choice": {"block_heads": 2, "num_warps": 1}}],
    }
    (tmp_path / "measured.json").write_text(json.dumps({"ops": ops}))
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path))
    gpu = "measured"
    assert choose_norm_config(32, 768, 2, "sm_90", gpu) == NormConfig(4, 1024, False, 8)
    # Never more rows than there are.
    assert choose_norm_config(2, 768, 2, "sm_90", gpu) == NormConfig(2, 1024, False, 8)
    assert choose_norm_config(32, 768, 2, "sm_90", gpu, "softmax") == NormConfig(1, 2048, True, 8)
    assert choose_pointwise_config(1000, "sm_90", gpu) == PointwiseConfig(2, 512, 8)
    assert choose_rotary_config(12, 64, "sm_90", gpu) == RotaryConfig(2, 1)
    # What was not measured takes the heuristic.
    assert choose_norm_config(32, 768, 4, "sm_90", gpu) == choose_norm_config(32, 768, 4, "sm_90")
    assert choose_rotary_config(12, 128, "sm_90", gpu) == choose_rotary_config(12, 128, "sm_90")


def test_invalid_choices_are_refused() -> None:
    with pytest.raises(ValueError, match="block_heads is 3; it must be a power of two"):
        RotaryConfig(3, 4)
