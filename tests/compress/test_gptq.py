"""GPTQ: less output error than round-to-nearest where inputs go together, the same where they do not."""

from __future__ import annotations

import pytest
import torch

from fastattn.compress.quantization.gptq import quantize_gptq
from fastattn.compress.quantization.hqq import quantize_hqq
from fastattn.ops import quantize_absmax

SCHEMES = ["int4-weight", "int8", "int8-weight", "fp8"]


def _to_nearest(weight, scheme):
    return quantize_hqq(weight) if scheme == "int4-weight" else quantize_absmax(weight, scheme)


def _correlated(rows, features, rank):
    """Inputs with a few directions in common and channels of different sizes."""
    mixed = torch.randn(rows, rank) @ torch.randn(rank, features) + 0.1 * torch.randn(rows, features)
    return mixed * torch.linspace(0.2, 2.0, features)


def _output_error(packed, weight, inputs):
    return float(((packed.dequantize() - weight) @ inputs.T).norm())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("act_order", [True, False])
def test_output_error_is_below_round_to_nearest_on_inputs_not_seen(scheme, act_order):
    # 200 columns: two blocks, the last group and block short.
    inputs, weight = _correlated(3000, 200, 20), torch.randn(24, 200) * 0.05
    seen, unseen = inputs[:2000], inputs[2000:]
    packed = quantize_gptq(weight, seen.T @ seen / len(seen), scheme, act_order=act_order)
    assert packed.scheme == scheme
    assert _output_error(packed, weight, unseen) < 0.6 * _output_error(
        _to_nearest(weight, scheme), weight, unseen
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_identity_hessian_is_round_to_nearest(scheme):
    weight = torch.randn(16, 160)
    packed = quantize_gptq(weight, torch.eye(160), scheme)
    assert torch.equal(packed.dequantize(), _to_nearest(weight, scheme).dequantize())


def test_the_columns_order_does_not_change_what_group_they_are_in():
    """Rounding to nearest, whatever the order: inputs of different sizes that do not go together."""
    weight = torch.randn(8, 128)
    hessian = torch.diag(torch.rand(128) + 0.5)
    assert torch.equal(quantize_gptq(weight, hessian).dequantize(), quantize_hqq(weight).dequantize())


def test_equal_to_the_exact_greedy_solution():
    """Each column's error is made up for by least squares over the columns left, solved afresh in float64."""
    inputs, weight = _correlated(500, 24, 6), torch.randn(5, 24)
    hessian = inputs.T @ inputs / len(inputs)
    packed = quantize_gptq(weight, hessian, "int8", act_order=False, damping=0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean().double() * torch.eye(24).double()
    rest, scales = weight.double(), packed.scales[:, 0].double()
    expected = torch.zeros(5, 24, dtype=torch.float64)
    for column in range(24):
        expected[:, column] = (rest[:, column] / scales).round().clamp(-127, 127)
        error = rest[:, column] - expected[:, column] * scales
        left = slice(column + 1, 24)
        made_up = torch.linalg.solve(damped[left, left], damped[left, column])
        rest[:, left] += error[:, None] * made_up
    assert torch.equal(packed.values.double(), expected)


def test_inputs_that_were_always_zero():
    inputs, weight = _correlated(400, 64, 8), torch.randn(6, 64)
    inputs[:, [3, 40]] = 0.0
    packed = quantize_gptq(weight, inputs.T @ inputs / len(inputs))
    nearest = quantize_hqq(weight).dequantize()
    assert torch.equal(packed.dequantize()[:, [3, 40]], nearest[:, [3, 40]])
    assert _output_error(packed, weight, inputs) < _output_error(quantize_hqq(weight), weight, inputs)
    nothing = quantize_gptq(weight, torch.zeros(64, 64))
    assert torch.equal(nothing.dequantize(), nearest)


def test_fewer_inputs_than_columns():
    inputs, weight = torch.randn(5, 256), torch.randn(6, 256)
    packed = quantize_gptq(weight, inputs.T @ inputs / 5)
    assert _output_error(packed, weight, inputs) < 0.5 * _output_error(quantize_hqq(weight), weight, inputs)


@pytest.mark.parametrize(
    ("hessian", "options", "says"),
    [
        (torch.eye(32), {}, r"\[32, 32\] and \[4, 64\]"),
        (torch.eye(64) * torch.inf, {}, "finite"),
        (torch.eye(64) - 2.0 * torch.ones(64, 64), {}, "eigenvalues"),
        (torch.eye(64), {"scheme": "int3"}, "int3"),
        (torch.eye(64), {"group_size": 16}, "16"),
        (torch.eye(64), {"damping": 0.0}, "damping"),
    ],
)
def test_bad_input(hessian, options, says):
    with pytest.raises(ValueError, match=says):
        quantize_gptq(torch.ones(4, 64), hessian, **options)
