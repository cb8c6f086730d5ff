"""HQQ's four-bit weights: less error than round-to-nearest where tails are heavy, at any shape."""

from __future__ import annotations

import pytest
import torch

from fastattn.compress.quantization.hqq import quantize_hqq
from fastattn.ops import quantize_absmax


def _error(packed, weight, power):
    return (packed.dequantize() - weight).abs().pow(power).mean()


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_beats_round_to_nearest_for_heavy_tails(group_size):
    weight = torch.distributions.StudentT(3.0).sample((48, 256)) * 0.02
    hqq, absmax = quantize_hqq(weight, group_size), quantize_absmax(weight, "int4-weight", group_size)
    assert _error(hqq, weight, 0.7) < 0.9 * _error(absmax, weight, 0.7)
    assert _error(hqq, weight, 2.0) < _error(absmax, weight, 2.0)


def test_moving_the_zero_point_leaves_less_error_than_the_range_alone():
    weight = torch.distributions.StudentT(3.0).sample((48, 256)) * 0.02
    low, high = weight.view(48, 4, 64).aminmax(dim=2, keepdim=True)
    scale = (high - low) / 15
    plain = ((weight.view(48, 4, 64) - low) / scale).round() * scale + low
    range_error = (plain.view(48, 256) - weight).abs().pow(0.7).mean()
    assert _error(quantize_hqq(weight, 64), weight, 0.7) < 0.97 * range_error


def test_groups_of_one_value_and_zeros_are_exact():
    weight = torch.zeros(3, 128)
    weight[1] = 0.75
    weight[2, 64:] = -1e-6
    assert torch.allclose(quantize_hqq(weight, 64).dequantize(), weight, rtol=1e-6, atol=0)


def test_a_short_last_group_is_quantized_like_the_others():
    weight = torch.randn(5, 97) * 0.02
    weight[:, 96] += 1.0
    packed = quantize_hqq(weight, 32)
    assert packed.scales.shape == (5, 4)
    assert torch.allclose(packed.dequantize()[:, 96], weight[:, 96], rtol=1e-6)
    head = quantize_hqq(weight[:, :96].contiguous(), 32)
    assert torch.equal(packed.dequantize()[:, :96], head.dequantize())


def test_rows_are_independent_however_many_are_worked_on_at_once(monkeypatch):
    from fastattn.compress.quantization import hqq

    weight = torch.randn(11, 64)
    whole = quantize_hqq(weight, 32).dequantize()
    monkeypatch.setattr(hqq, "_CPU_CHUNK", 200)
    assert torch.equal(quantize_hqq(weight, 32).dequantize(), whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_computed_in_float32(dtype):
    weight = torch.randn(8, 64).to(dtype)
    assert torch.equal(quantize_hqq(weight).dequantize(), quantize_hqq(weight.float()).dequantize())


@pytest.mark.parametrize(
    ("weight", "group_size", "error", "says"),
    [
        (torch.ones(4, 64), 48, ValueError, "48"),
        (torch.ones(64), 64, ValueError, r"\[64\]"),
        (torch.full((4, 64), torch.nan), 64, ValueError, "finite"),
        (torch.ones(4, 64, dtype=torch.int8), 64, TypeError, "int8"),
    ],
)
def test_bad_input(weight, group_size, error, says):
    with pytest.raises(error, match=says):
        quantize_hqq(weight, group_size)
