"""`ops.quantized_linear` as one node: a well-formed operator, few graphs, dynamic export, gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn import ops
from fastattn.ops.packed_weight import SCHEMES
from fastattn.ops.quantized_linear import _arguments


def packed_of(scheme, prepared=False):
    packed = replace(ops.quantize_absmax(torch.randn(64, 64), scheme), input_scales=torch.rand(64) + 0.5)
    return ops.prepare(packed) if prepared else packed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "silu", "relu"])
def test_opcheck(scheme, activation):
    packed = packed_of(scheme, prepared=activation is None)
    x, bias = torch.randn(2, 3, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    operation = torch.ops.fastattn.quantized_linear.default
    results = torch.library.opcheck(operation, (x, *_arguments(packed, bias), activation))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_changing_lengths_make_at_most_two_graphs(scheme, prepared):
    torch._dynamo.reset()
    packed, bias = packed_of(scheme, prepared), torch.randn(64)
    counter = CompileCounterWithBackend("aot_eager")

    def call(x):
        return ops.quantized_linear(x, packed, bias, "gelu")

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for length in (4, 5, 17, 9, 64):
        x = torch.randn(length, 64)
        torch.testing.assert_close(compiled(x), call(x))
    assert counter.frame_count <= 2
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "fastattn" in str(node.target)]
    assert len(calls) == counter.frame_count, "one node an operation"


@pytest.mark.parametrize("activation", [None, "gelu", "relu", "silu"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_of_the_compiled_operator(scheme, activation):
    torch._dynamo.reset()
    packed = packed_of(scheme)
    x, bias = torch.randn(3, 64, requires_grad=True), torch.randn(64, requires_grad=True)

    def gradients(call):
        return torch.autograd.grad(call(x, packed, bias, activation).sin().sum(), (x, bias))

    compiled = torch.compile(ops.quantized_linear, fullgraph=True, backend="aot_eager")
    for found, expected in zip(gradients(compiled), gradients(ops.quantized_linear), strict=True):
        torch.testing.assert_close(found, expected)


class Layer(nn.Module):
    def __init__(self, scheme, prepared):
        super().__init__()
        packed = packed_of(scheme, prepared)
        self.values, self.scales = nn.Buffer(packed.values), nn.Buffer(packed.scales)
        self.zero_points = None if packed.zero_points is None else nn.Buffer(packed.zero_points)
        self.made = (packed.scheme, packed.in_features, packed.group_size)
        self.layout = packed.layout

    def forward(self, x):
        packed = ops.PackedWeight(
            self.values, self.scales, *self.made, zero_points=self.zero_points, layout=self.layout
        )
        return ops.quantized_linear(x, packed)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dynamic_export(scheme, prepared):
    layer = Layer(scheme, prepared)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(layer, (torch.randn(2, 3, 64),), dynamic_shapes=dynamic)
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    # float8 numbers are looked at as bytes.
    viewed = ["aten.view.dtype"] if scheme == "fp8" else []
    assert calls == [*viewed, "fastattn.quantized_linear.default"]
    x = torch.randn(5, 7, 64)
    torch.testing.assert_close(program.module()(x), layer(x))
