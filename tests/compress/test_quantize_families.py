"""Every family, quantized in every scheme before and after `optimize`: what runs is the quantized weights,
and nothing reads them as floats. The cases are those of tests/models/family_cases.py.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.compress.quantization import speed
from fastattn.layers import QuantizedLinear

transformers = pytest.importorskip("transformers")

sys.path[:0] = [str(Path(__file__).parents[1] / "models")]

from family_cases import CASES  # noqa: E402
from family_models import (  # noqa: E402
    assert_same_tokens,
    batch,
    build,
    outputs,
    rows_and_positions,
    uncached,
)

pytestmark = pytest.mark.model

SCHEMES = fastattn.ops.packed_weight.SCHEMES
# Of an output's norm. A row's rounding can tip over where its input differs in the last bit, by 1/127 of the
# row's largest magnitude (int8) or 1/16 of one value (fp8), and these models' weights are wide.
TOLERANCES = {"int8-weight": 1e-4, "int4-weight": 1e-4, "int8": 0.02, "fp8": 0.1}


@pytest.fixture(params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def case(request):
    return request.param


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(speed, "_BUDGET_S", 0.0)


class Emulated(torch.nn.Module):
    """The quantized layer's formula: its inputs' rows rounded where its scheme says so, in float."""

    def __init__(self, layer):
        super().__init__()
        self.scheme, self.bias = layer.scheme, layer.bias
        self.weight = layer.packed_weight.dequantize()

    def forward(self, x):
        largest = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        if self.scheme == "int8":
            x = (x / (largest / 127)).round() * (largest / 127)
        elif self.scheme == "fp8":
            x = (x / (largest / 448)).to(torch.float8_e4m3fn).to(x.dtype) * (largest / 448)
        return torch.nn.functional.linear(x, self.weight, self.bias)


def emulated(model):
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if isinstance(layer, QuantizedLinear):
                parent._modules[name] = Emulated(layer)
    return model


def close(case, scheme, context, model, inputs, expected):
    found = outputs(model(**inputs, **uncached(model)))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        want, got = (rows_and_positions(name, each, inputs).double() for each in (value, found[name]))
        wrong = float((got - want).norm() / want.norm())
        assert wrong <= TOLERANCES[scheme], f"{case.name}, {scheme}, {context}: {name} is {wrong:.2e} off"


@torch.no_grad()
def test_every_scheme_before_and_after_optimize(case):
    """The same linear layers are quantized either way, all but the heads, and run as their formula says."""
    for scheme in SCHEMES:
        model = build(case, case.base, case.reference)
        inputs = batch(model, "right")
        report = fastattn.quantize(model, scheme, max_error=0.5)
        assert report.quantized and not [each for each in report.layers if each.status == "kept"]
        expected = outputs(emulated(model)(**inputs, **uncached(model)))
        close(case, scheme, "untouched", model, inputs, expected)
        fastattn.optimize(model)
        close(case, scheme, "optimized afterwards", model, inputs, expected)
        if scheme == "int8":
            model = build(case, case.base)
            fastattn.optimize(model)
            assert fastattn.quantize(model, scheme, max_error=0.5).quantized == report.quantized
            close(case, scheme, "optimized first", model, inputs, expected)


@torch.no_grad()
def test_generation(case):
    """With its caches, greedy and beams, the tokens of a float model of the same weights; the head stays."""
    if not case.generates:
        pytest.skip("does not generate")
    model = build(case, case.heads[0], case.reference)
    report = fastattn.quantize(model, "int8-weight", max_error=0.5)
    heads = [each.name for each in report.layers if each.reason == "output head"]
    assert heads, report.table()
    reference = emulated(model)
    fastattn.optimize(model)
    inputs = batch(model, "left")
    for cache, beams in (("dynamic", 1), (case.caches[-1], 2)):
        assert_same_tokens(model, reference, inputs, num_beams=beams, cache_implementation=cache)
