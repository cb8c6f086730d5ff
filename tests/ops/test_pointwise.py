"""`ops.add_layer_norm`, `ops.bias_gelu` and `ops.packed_linear` against PyTorch's own, values and
gradients.
"""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close
from torch import nn
from torch.nn.functional import gelu, layer_norm, linear

from fastattn import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 64), (7, 33), (1, 1), (0, 8), (2, 1, 1000)])
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_add_layer_norm(dtype, shape, affine):
    x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype) * 3
    weight, bias = (torch.randn(shape[-1], dtype=dtype) if used else None for used in affine)
    normalized, total = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert torch.equal(total, residual + x)
    exact = layer_norm(
        total.double(), shape[-1:], *(p if p is None else p.double() for p in (weight, bias)), 1e-5
    )
    assert_close(normalized, layer_norm(total, shape[-1:], weight, bias, 1e-5), exact)


def test_add_layer_norm_promotes_mixed_dtypes_and_takes_float32_parameters():
    x, residual = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    normalized, total = ops.add_layer_norm(x, residual, weight, bias, 1e-5)
    assert normalized.dtype == total.dtype == torch.float32
    torch.testing.assert_close(normalized, layer_norm(x + residual, (8,), weight, bias, 1e-5))
    half, _ = ops.add_layer_norm(x, residual.bfloat16(), weight, bias, 1e-5)
    assert half.dtype == torch.bfloat16


def test_add_layer_norm_any_strides_and_no_aliasing():
    x, residual = torch.randn(8, 5).T, torch.randn(5, 16)[:, ::2]
    normalized, total = ops.add_layer_norm(x, residual, None, None, 1e-5)
    torch.testing.assert_close(normalized, layer_norm(x + residual, (8,)))
    assert total.data_ptr() not in (x.data_ptr(), residual.data_ptr())


def test_add_layer_norm_dropout():
    x, residual = torch.ones(64, 256, requires_grad=True), torch.zeros(64, 256)
    torch.manual_seed(5)
    _, total = ops.add_layer_norm(x, residual, None, None, 1e-5, dropout_p=0.25)
    assert set(total.detach().unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((total == 0).float().mean().item() - 0.25) < 0.02
    (gradient,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(gradient, total)
    torch.manual_seed(5)
    assert torch.equal(ops.add_layer_norm(x, residual, None, None, 1e-5, dropout_p=0.25)[1], total)


def test_add_layer_norm_gradients():
    shapes = [(3, 8), (3, 8), (8,), (8,)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *a: ops.add_layer_norm(*a, 1e-5), leaves)


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
        (
            lambda: ops.add_layer_norm(torch.ones(2, 4), torch.ones(2, 5), None, None, 1e-5),
            ValueError,
            "one shape",
        ),
        (
            lambda: ops.add_layer_norm(torch.ones(2, 4), torch.ones(2, 4), torch.ones(3), None, 1e-5),
            ValueError,
            "weight",
        ),
        (
            lambda: ops.add_layer_norm(torch.ones(2, 4), torch.ones(2, 4), None, None, 1e-5, 2.0),
            ValueError,
            "dropout_p",
        ),
        (
            lambda: ops.add_layer_norm(torch.ones(2, 4).int(), torch.ones(2, 4), None, None, 1e-5),
            TypeError,
            "x is",
        ),
        (lambda: ops.bias_gelu(torch.ones(2, 4), torch.ones(3)), ValueError, r"bias \[N\]"),
        (lambda: ops.bias_gelu(torch.ones(2, 4), torch.ones(4), "erf"), ValueError, "'none' and 'tanh'"),
        (
            lambda: ops.bias_gelu(torch.ones(2, 4), torch.ones(4, device="meta")),
            ValueError,
            "bias is on meta",
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
