"""The measured error of quantized layers, and the ranking by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastattn.compress.calibration import Calibration
from fastattn.compress.quantization.hqq import quantize_hqq
from fastattn.compress.quantization.sensitivity import output_error, ranked
from fastattn.ops import quantize_absmax


@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4-weight", "fp8"])
def test_error_is_that_of_the_outputs(scheme):
    linear, rows = nn.Linear(96, 40), torch.randn(50, 96)
    packed = quantize_absmax(linear.weight.detach(), scheme)
    weight, exact = linear.weight.detach().double(), rows.double()
    given = exact
    if scheme in ("int8", "fp8"):
        largest = {"int8": 127.0, "fp8": 448.0}[scheme]
        scales = given.abs().amax(dim=1, keepdim=True) / largest
        given = given / scales
        given = (given.round() if scheme == "int8" else given.to(torch.float8_e4m3fn).double()) * scales
    expected = (given @ packed.dequantize(torch.float64).T - exact @ weight.T).norm()
    expected = float(expected / (exact @ weight.T).norm())
    assert output_error(linear, packed, rows) == pytest.approx(expected, rel=0.02)
    assert output_error(linear.weight, packed, rows) == output_error(linear, packed, rows)


def test_without_inputs_it_is_the_weights_error():
    weight = torch.randn(40, 64)
    packed = quantize_hqq(weight)
    expected = float((packed.dequantize() - weight).norm() / weight.norm())
    assert output_error(weight, packed) == pytest.approx(expected)


def test_a_weight_stored_transposed_has_the_same_error():
    transformers = pytest.importorskip("transformers")
    linear, conv = nn.Linear(64, 32), transformers.pytorch_utils.Conv1D(32, 64)
    conv.weight.data = linear.weight.data.T.contiguous()
    packed, rows = quantize_hqq(linear.weight.detach()), torch.randn(9, 64)
    assert output_error(conv, packed, rows) == output_error(linear, packed, rows)


def test_nothing_to_lose():
    packed = quantize_absmax(torch.zeros(3, 4), "int8")
    assert output_error(torch.zeros(3, 4), packed, torch.ones(2, 4)) == 0.0
    assert output_error(torch.zeros(3, 4), packed) == 0.0


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[4, 3\].*\[3, 4\]"):
        output_error(torch.zeros(4, 3), quantize_absmax(torch.ones(3, 4), "int8"))


class _Planted(nn.Module):
    """Layers of one make; the second is given inputs whose small channels decide, beside a large one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        outs = [self.layers[0](x)]
        outlying = x.clone()
        outlying[:, 0] = 400.0
        outs.append(self.layers[1](outlying))
        outs.extend(layer(x) for layer in self.layers[2:])
        return sum(outs)


def test_the_planted_bad_layer_is_found_from_its_inputs():
    model = _Planted()
    with torch.no_grad():
        model.layers[1].weight[:, 0] = 0.0
    names = [f"layers.{index}" for index in range(4)]

    def to_int8(weight):
        return quantize_absmax(weight, "int8")

    calibration = Calibration.of([torch.randn(40, 64)], model)
    errors = ranked(model, names, to_int8, calibration)
    assert errors[0][0] == "layers.1"
    assert errors[0][1] > 10 * errors[1][1]
    assert [error for _, error in errors] == sorted((error for _, error in errors), reverse=True)
    # The weights alone do not show it.
    assert ranked(model, names, to_int8)[0][1] < 0.02


def test_the_planted_bad_layer_is_found_from_its_weight():
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    with torch.no_grad():
        model[2].weight[:, ::32] *= 100.0
        model[2].weight[:, 1::32] *= 30.0
    spread = torch.ones(64)
    spread[::32] = spread[1::32] = 0.001
    calibration = Calibration.of([torch.randn(40, 64)], model)
    handle = model[2].register_forward_pre_hook(lambda _, args: (args[0] * spread,))
    assert ranked(model, ["0", "1", "2"], quantize_hqq, calibration)[0][0] == "2"
    handle.remove()
    with pytest.raises(ValueError, match="'5'"):
        ranked(model, ["0", "5"], quantize_hqq)
