"""Quantized linears in ONNX Runtime: the operators that each target has, and the numbers PyTorch computes."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastattn
from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from exported_cases import Exported, in_float64

SCHEMES = ("int8", "int8-weight", "int4-weight")


def packed_of(scheme, outputs, columns, zero_points="whole", input_scales=False):
    generator = torch.Generator().manual_seed(outputs * columns)
    weight = torch.randn(outputs, columns, generator=generator) / columns**0.5
    packed = ops.quantize_absmax(weight, scheme, 32 if scheme == "int4-weight" else None)
    if scheme == "int4-weight" and zero_points != "8":
        spread = torch.randn(packed.scales.shape, generator=generator)
        points = 8 + (spread.round() if zero_points == "whole" else spread)
        packed = replace(packed, zero_points=points.clamp(0, 15))
    return (
        replace(packed, input_scales=torch.rand(columns, generator=generator) + 0.5)
        if input_scales
        else packed
    )


def call(scheme, outputs, columns, bias=True, activation=None, single=False, tiles=False, **how):
    packed = packed_of(scheme, outputs, columns, **how)
    if tiles:
        packed = ops.prepare(packed)
    vector = torch.linspace(-1, 1, outputs) if bias else None

    def linear(x):
        rows = x["x"][..., :columns]
        return ops.quantized_linear(rows[0, 0] if single else rows, packed, vector, activation)

    return linear


CASES = {
    f"{scheme}, {name}": call(scheme, **arguments)
    for scheme in SCHEMES
    for name, arguments in {
        "plain": {"outputs": 64, "columns": 64},
        "odd sizes": {"outputs": 5, "columns": 33},
        "short group": {"outputs": 24, "columns": 150, "bias": False},
        "gelu": {"outputs": 16, "columns": 64, "activation": "gelu"},
        "gelu_tanh": {"outputs": 16, "columns": 64, "activation": "gelu_tanh"},
        "relu": {"outputs": 16, "columns": 64, "activation": "relu"},
        "silu": {"outputs": 16, "columns": 64, "activation": "silu"},
        "divided inputs": {"outputs": 16, "columns": 64, "input_scales": True},
        "one vector": {"outputs": 16, "columns": 64, "single": True},
    }.items()
} | {
    "int4-weight, symmetric": call("int4-weight", 16, 96, zero_points="8"),
    "int4-weight, zero points between integers": call("int4-weight", 16, 96, zero_points="real"),
    "int4-weight, tiles": call("int4-weight", 64, 64, tiles=True),
}


@functools.cache
def exported(target):
    return Exported(CASES, {"x": torch.randn(2, 3, 150)}, {"x": {0: "batch", 1: "sequence"}}, target)


@pytest.fixture(params=["cpu", "cuda", "standard"])
def graph(request):
    return exported(request.param)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (5, 7)], ids=str)
def test_results_are_pytorch_s(graph, shape):
    torch.manual_seed(0)
    inputs = {"x": torch.randn(*shape, 150)}
    inputs["x"] = torch.cat([inputs["x"], torch.zeros(1, *inputs["x"].shape[1:])])
    results = graph.run(inputs)
    for name, case in CASES.items():
        (found,) = results[name]
        expected = case(in_float64(inputs))
        # Rows of int8 are rounded: a half may go the other way in another order of float32 operations.
        allowed = 0.02 if name.startswith("int8,") else 2e-6
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= allowed, f"{name}: {error:.2e}"


def test_every_row_has_its_own_scale(graph):
    """One scale for all rows would leave nothing of the small ones."""
    x = torch.randn(3, 4, 150) * torch.logspace(-6, 6, 12).view(3, 4, 1)
    (found,) = graph.run({"x": x})["int8, short group"]
    expected = CASES["int8, short group"]({"x": x.double()})
    error = (found.double() - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() <= 0.02


def test_operators():
    # Calls that differ in their activation alone may share the product.
    kinds = Counter(node.op_type for node in exported("cpu").model.graph)
    assert kinds["MatMulIntegerToFloat"] >= 12 and kinds["MatMulNBits"] >= 6
    assert kinds["MatMul"] == kinds["Gemm"] == 0, "no product in float32"
    zero_points = {
        "none" if len(node.inputs) < 4 or node.inputs[3] is None else str(node.inputs[3].dtype)
        for node in exported("cpu").model.graph
        if node.op_type == "MatMulNBits" and node.attributes.get_int("bits") == 4
    }
    assert zero_points == {"none", "UINT8", "FLOAT"}, "whole numbers take four bits, 8 none at all"
    kinds = Counter(node.op_type for node in exported("standard").model.graph)
    assert kinds["MatMulInteger"] >= 12 and kinds["MatMulNBits"] == 0
    # A GPU has no integer product.
    assert Counter(node.op_type for node in exported("cuda").model.graph)["MatMulIntegerToFloat"] == 0


class Quantized(nn.Module):
    def __init__(self, scheme):
        super().__init__()
        self.first, self.second = (
            fastattn.layers.QuantizedLinear.from_packed(
                packed_of(scheme, *shape, "8"), nn.Parameter(torch.ones(shape[0]))
            )
            for shape in ((96, 64), (8, 96))
        )

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@pytest.mark.parametrize("target", ["cpu", "standard"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_module_with_quantized_layers_is_exported_and_verified(scheme, target, tmp_path):
    model = Quantized(scheme).eval()
    x = torch.randn(3, 64)
    fastattn.export(model, tmp_path, target=target, example_inputs={"x": x})
    with torch.inference_mode():
        expected = model(x)
    (found,) = fastattn.load(tmp_path)(x=x).values()
    torch.testing.assert_close(found, expected, rtol=0.02 if scheme == "int8" else 1e-4, atol=0.02)


def test_float8_is_refused():
    packed = ops.quantize_absmax(torch.randn(16, 16), "fp8")
    with pytest.raises(ValueError, match=r"float8.*'int8', 'int8-weight' or 'int4-weight'"):
        Exported(
            {"fp8": lambda x: ops.quantized_linear(x["x"], packed)}, {"x": torch.randn(2, 16)}, {"x": {}}
        )
