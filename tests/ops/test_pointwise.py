"""`ops.bias_gelu`, `ops.gated_activation` and `ops.packed_linear` against PyTorch's own, values and
gradients.
"""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close
from torch import nn
from torch.nn.functional import gelu, linear, silu

from fastattn import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu(dtype, approximate):
    x = torch.cat([torch.randn(20, 33), torch.tensor([[-1e4, 1e4, 0.0] * 11])]).to(dtype)
    bias = torch.randn(33, dtype=dtype)
    exact = gelu(x.double() + bias.double(), approximate=approximate)
    own = gelu(x + bias, approximate=approximate)
    assert_close(ops.bias_gelu(x, bias, approximate), own, exact)


def test_bias_gelu_leaves_its_input_alone_and_is_differentiable():
    x, bias = torch.randn(3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    before = x.clone()
    ops.bias_gelu(x, bias)
    assert torch.equal(x, before)
    assert torch.autograd.gradcheck(ops.bias_gelu, (x.requires_grad_(), bias.requires_grad_()))


def _activation(x, kind):
    return silu(x) if kind == "silu" else gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(3, 5, 33), (64,), (0, 8), (1, 1)])
def test_gated_activation(shape, kind, dtype):
    # Two halves of one product, as models have them.
    product = torch.cat([torch.randn(shape) * 4, torch.randn(shape)], -1).to(dtype)
    before = product.clone()
    gate, up = product.chunk(2, -1)
    found = ops.gated_activation(gate, up, kind)
    assert found.dtype == dtype
    exact = _activation(gate.double(), kind) * up.double()
    assert_close(found, _activation(gate, kind) * up, exact)
    assert torch.equal(product, before), "the arguments were written to"


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_gated_activation_gradients(kind):
    gate, up = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *a: ops.gated_activation(*a, kind), (gate, up))
    frozen = up.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(ops.gated_activation(gate.detach(), frozen, kind).sum(), frozen)
    torch.testing.assert_close(gradient, _activation(gate.detach(), kind))


def _weights(sizes, width, dtype=torch.float32):
    return [torch.randn(size, width, dtype=dtype) for size in sizes]


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (0, 8), (1, 1, 8)])
def test_packed_linear_separate_weights(with_bias, shape):
    x, weights = torch.randn(shape), _weights((4, 6, 4), 8)
    biases = [torch.randn(len(w)) if with_bias else None for w in weights]
    for found, weight, bias in zip(ops.packed_linear(x, weights, biases), weights, biases, strict=True):
        torch.testing.assert_close(found, linear(x, weight, bias))


def test_packed_linear_multiplies_once_where_weights_are_adjacent(monkeypatch):
    from fastattn.ops import linear as module

    calls = []
    monkeypatch.setattr(module, "linear", lambda *a: calls.append(1) or linear(*a))
    buffer, biases_buffer = torch.randn(14, 8), torch.randn(14)
    weights = [nn.Parameter(part) for part in buffer.split((4, 6, 4))]
    biases = [nn.Parameter(part) for part in biases_buffer.split((4, 6, 4))]
    x = torch.randn(3, 5, 8, requires_grad=True)
    outputs = ops.packed_linear(x, weights, biases)
    assert len(calls) == 1
    for found, weight, bias in zip(outputs, weights, biases, strict=True):
        torch.testing.assert_close(found, linear(x, weight, bias))
    sum(out.sin().sum() for out in outputs).backward()
    gradients = [p.grad for p in (x, *weights, *biases)]
    for p in (x, *weights, *biases):
        p.grad = None
    sum(linear(x, w, b).sin().sum() for w, b in zip(weights, biases, strict=True)).backward()
    for found, p in zip(gradients, (x, *weights, *biases), strict=True):
        torch.testing.assert_close(found, p.grad)
    # Out of order, they are no longer one matrix.
    calls.clear()
    ops.packed_linear(x, weights[::-1], biases[::-1])
    assert len(calls) == 3


def test_packed_linear_gradients_with_frozen_and_missing_parameters():
    x, weights = torch.randn(3, 8, requires_grad=True), _weights((4, 6), 8)
    weights[0].requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    first, second = ops.packed_linear(x, weights, [None, bias])
    (first.sum() + second.sum()).backward()
    assert weights[1].grad is None
    torch.testing.assert_close(bias.grad, torch.full((6,), 3.0))
    torch.testing.assert_close(weights[0].grad, x.detach().sum(0).expand(4, 8))


def test_packed_linear_under_autocast():
    x, weights = torch.randn(3, 8), _weights((4, 6), 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.packed_linear(x, weights, [torch.randn(4), None])
        expected = linear(x, weights[1])
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[1], expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.bias_gelu(torch.ones(2, 4), torch.ones(3)), ValueError, r"bias \[N\]"),
        (lambda: ops.bias_gelu(torch.ones(2, 4), torch.ones(4), "erf"), ValueError, "'none' and 'tanh'"),
        (
            lambda: ops.bias_gelu(torch.ones(2, 4), torch.ones(4, device="meta")),
            ValueError,
            "bias is on meta",
        ),
        (
            lambda: ops.gated_activation(torch.ones(2, 4), torch.ones(2, 4), "relu"),
            ValueError,
            "kind is 'relu'; accepted are 'silu', 'gelu' and 'gelu_tanh'",
        ),
        (
            lambda: ops.gated_activation(torch.ones(2, 4), torch.ones(4)),
            ValueError,
            r"got \[2, 4\] and \[4\]",
        ),
        (
            lambda: ops.gated_activation(torch.ones(2, 4), torch.ones(2, 4).half()),
            TypeError,
            "up is torch.float16 but gate is torch.float32",
        ),
        (
            lambda: ops.gated_activation(torch.ones(2, 4).int(), torch.ones(2, 4).int()),
            TypeError,
            "gate is torch.int32",
        ),
        (lambda: ops.packed_linear(torch.ones(2, 4), [], []), ValueError, "at least one weight"),
        (
            lambda: ops.packed_linear(torch.ones(2, 4), [torch.ones(3, 5)], [None]),
            ValueError,
            r"weights\[0\]",
        ),
        (
            lambda: ops.packed_linear(torch.ones(2, 4), [torch.ones(3, 4)], [torch.ones(4)]),
            ValueError,
            r"biases\[0\]",
        ),
        (
            lambda: ops.packed_linear(torch.ones(2, 4), [torch.ones(3, 4).half()], [None]),
            TypeError,
            "float16",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
