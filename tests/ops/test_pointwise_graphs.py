"""Norms and pointwise operations as one node each: well-formed operators, few graphs, the same under autocast
and differentiated through the operator as through PyTorch.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastattn import ops

SEED = torch.tensor([2**40 + 5])


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


# The registered operators, with every kind of argument each has.
OPERATORS = {
    "layer_norm": (leaf(2, 3, 8), leaf(8), leaf(8), 1e-5),
    "layer_norm of strided rows": (leaf(8, 3).T, None, None, 1e-5),
    "rms_norm": (leaf(2, 3, 8), leaf(8), 1e-5, 1.0),
    "rms_norm without weight": (leaf(3, 8), None, 1e-5, 0.0),
    "add_layer_norm": (leaf(3, 8), leaf(3, 8), leaf(8), leaf(8), 1e-5, 0.0, None),
    "add_layer_norm with dropout": (leaf(3, 8), leaf(3, 8), leaf(8), None, 1e-5, 0.2, SEED),
    "add_rms_norm": (leaf(3, 8), leaf(3, 8), leaf(8), 1e-5, 0.0, 0.0, None),
    "add_rms_norm with dropout": (leaf(3, 8), leaf(3, 8), leaf(8), 1e-5, 1.0, 0.2, SEED),
    "softmax": (leaf(2, 3, 5), None, 1.0, False),
    "softmax with mask": (leaf(2, 3, 5), torch.tensor([True, True, False, True, False]), 0.5, True),
    "gated_activation": (leaf(3, 8), leaf(3, 8), "silu"),
    "gated_activation of halves": (leaf(3, 16)[:, :8], leaf(3, 16)[:, 8:], "gelu_tanh"),
    "bias_gelu": (leaf(3, 8), leaf(8), "none"),
    "rotary": (leaf(2, 4, 5, 8), leaf(2, 2, 5, 8), leaf(5, 6), leaf(5, 6), False),
    "rotary of transposed heads": (
        leaf(2, 5, 4, 8).transpose(1, 2), leaf(2, 5, 2, 8).transpose(1, 2),
        leaf(2, 5, 8), leaf(2, 5, 8), True,
    ),
}  # fmt: skip
# Without a gradient.
QUANTIZED = {
    "add_layer_norm_quantized": (3, None, 1e-5, 0.0, None, "int8"),
    "add_rms_norm_quantized": (3, 1e-5, 1.0, 0.2, SEED, "fp8"),
}


def operator(name: str):
    return getattr(torch.ops.fastattn, name.split(" ")[0]).default


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    results = torch.library.opcheck(operator(name), OPERATORS[name])
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("name", QUANTIZED)
def test_opcheck_without_gradient(name):
    rows, *rest = QUANTIZED[name]
    arguments = (torch.randn(rows, 8), torch.randn(rows, 8), torch.randn(8), *rest)
    assert set(torch.library.opcheck(operator(name), arguments).values()) == {"SUCCESS"}


# What a user calls, over tensors whose first dimension but one is `length`.
def _rotary(x):
    query = x.view(1, -1, 2, 8).transpose(1, 2)
    angles = x[:, :6]
    return ops.rotary(query, query[:, :1], angles, angles, True)[0]


CALLS = {
    "layer_norm": lambda x: ops.layer_norm(x, x[0], x[1], 1e-5),
    "rms_norm": lambda x: ops.rms_norm(x, x[0], 1e-5, 1.0),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, x * 2, x[0], None, 1e-5)[0],
    "add_rms_norm": lambda x: ops.add_rms_norm(x, x * 2, x[0], 1e-5)[0],
    "softmax": lambda x: ops.softmax(x @ x.T, x[:, 0] > -1, 0.3, True),
    "gated_activation": lambda x: ops.gated_activation(*x.chunk(2, -1), "gelu"),
    "bias_gelu": lambda x: ops.bias_gelu(x, x[0]),
    "rotary": _rotary,
}
CALLED = pytest.mark.parametrize("name", CALLS)


@CALLED
def test_changing_lengths_make_at_most_two_graphs(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], fullgraph=True, backend=counter)
    for length in (4, 5, 17, 9, 64):
        x = torch.randn(length, 16)
        torch.testing.assert_close(compiled(x), CALLS[name](x))
    assert counter.frame_count <= 2
    calls = [node for graph in counter.graphs for node in graph.graph.nodes if "fastattn" in str(node.target)]
    assert len(calls) == counter.frame_count, "one node an operation"


@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantized_norms_compile(quantize):
    compiled = torch.compile(ops.add_rms_norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    found = compiled(x, x, x[0], 1e-5, quantize=quantize)
    expected = ops.add_rms_norm(x, x, x[0], 1e-5, quantize=quantize)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=0)


@CALLED
def test_the_operator_s_gradient_is_autograd_s(name):
    # Compiled, the operator recomputes through its reference; outside, PyTorch differentiates its own calls.
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    weights = torch.randn_like(CALLS[name](x))
    gradients = [torch.autograd.grad((call(x) * weights).sum(), x)[0] for call in (compiled, CALLS[name])]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@CALLED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(name, dtype):
    # They are float32 inside whatever the dtype; the matrix product of softmax's case is autocast's own.
    x = torch.randn(6, 16).to(dtype)
    call = CALLS[name] if name != "softmax" else lambda x: ops.softmax(x, None, 0.3, True)
    expected = call(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(x)
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(x)
    assert found.dtype == compiled.dtype == dtype
    assert torch.equal(found, expected)
    torch.testing.assert_close(compiled, expected)
