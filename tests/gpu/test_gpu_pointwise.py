"""Softmax, activations and rotary on the GPU against float64."""

from __future__ import annotations

import gpu_exact
import pytest
import torch
from gpu_checks import INTERPRETED, Draw, assert_exact, length, run_twice
from torch.nn import functional

from fastattn import ops

WIDTHS = [1, 13, 128, 1000] if INTERPRETED else [1, 13, 128, 1000, 4096, 8192, 20000, 65536]


@pytest.mark.parametrize("width", WIDTHS)
def test_softmax(width: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    draw = Draw(generator, device, dtype)
    x = draw(2, 3, 9, width) * 4
    for mask in (None, draw.mask(2, 1, 1, width), draw.mask(3, 9, width, share=0.2)):
        (found,) = run_twice(lambda mask=mask: ops.softmax(x, mask, scale=0.5))
        exact, own = (gpu_exact.softmax(x, mask, 0.5, False, each) for each in (torch.float64, dtype))
        assert_exact(found, exact, own)


@pytest.mark.parametrize("shape", [(64, 64), (5, 300), (300, 5)], ids=str)
def test_causal_softmax(
    shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    x, mask = draw(2, 2, *shape), draw.mask(2, 1, 1, shape[1])
    for each_mask in (None, mask):
        (found,) = run_twice(lambda mask=each_mask: ops.softmax(x, mask, causal=True))
        exact, own = (gpu_exact.softmax(x, each_mask, 1.0, True, each) for each in (torch.float64, dtype))
        assert_exact(found, exact, own)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(
    width: int, approximate: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    x, bias = draw(3, 11, width) * 3, draw(width)
    (found,) = run_twice(lambda: ops.bias_gelu(x, bias, approximate=approximate))
    exact, own = (
        functional.gelu(x.to(each) + bias.to(each), approximate=approximate)
        for each in (torch.float64, dtype)
    )
    assert_exact(found, exact, own)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation(
    width: int, kind: str, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    # Both halves of one projection, as models have them.
    for gate, up in ((draw(3, 7, 2 * width) * 3).chunk(2, -1), (draw(5, width), draw(5, width))):
        (found,) = run_twice(lambda gate=gate, up=up: ops.gated_activation(gate, up, kind=kind))
        exact, own = (gpu_exact.gated_activation(gate, up, kind, each) for each in (torch.float64, dtype))
        assert_exact(found, exact, own)


@pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (80, 32), (256, 64), (96, 96)], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["positions", "batched"])
def test_rotary(
    interleaved: bool, sizes: tuple[int, int], batched: bool, dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    draw = Draw(generator, device, dtype)
    size, turned = sizes
    positions = length(211)
    query, key = draw.heads(2, 8, positions, size), draw.heads(2, 2, positions, size)
    angles = draw(*((2,) if batched else ()), positions, turned // 2, dtype=torch.float32)
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    found = run_twice(lambda: ops.rotary(query, key, cos, sin, interleaved=interleaved))
    for each, x in zip(found, (query, key), strict=True):
        exact, own = (gpu_exact.rotary(x, cos, sin, interleaved, d) for d in (torch.float64, dtype))
        assert_exact(each, exact, own)
