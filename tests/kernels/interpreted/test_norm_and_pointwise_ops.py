"""The public operations reach their kernels: every argument arrives where it belongs, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastattn
from fastattn import ops


def make(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


X, RESIDUAL, WEIGHT, BIAS = make(3, 5, 24), make(3, 5, 24) + 1, make(24), make(24) + 2
ANGLES = make(5, 8)
MASK = torch.tensor([True] * 20 + [False] * 4)

CALLS: dict[str, Callable[[torch.Tensor], object]] = {
    "layer_norm": lambda x: ops.layer_norm(x, WEIGHT, BIAS, 1e-3),
    "rms_norm": lambda x: ops.rms_norm(x, WEIGHT, 1e-3, 1.0),
    "add_layer_norm": lambda x: ops.add_layer_norm(x, RESIDUAL, WEIGHT, BIAS, 1e-3, 0.3),
    "add_rms_norm": lambda x: ops.add_rms_norm(x, RESIDUAL, WEIGHT, 1e-3, 0.3, 1.0),
    "softmax": lambda x: ops.softmax(x, MASK, 0.3, True),
    "bias_gelu": lambda x: ops.bias_gelu(x, BIAS, "tanh"),
    "gated_activation": lambda x: ops.gated_activation(x, RESIDUAL, "gelu_tanh"),
    "rotary": lambda x: ops.rotary(x[None], RESIDUAL[None], ANGLES, ANGLES + 1, True),
}
QUANTIZED: dict[str, Callable[[str], object]] = {
    "add_layer_norm": lambda quantize: ops.add_layer_norm(
        X, RESIDUAL, WEIGHT, BIAS, 1e-3, 0.3, quantize=quantize
    ),
    "add_rms_norm": lambda quantize: ops.add_rms_norm(X, RESIDUAL, WEIGHT, 1e-3, 0.3, 1.0, quantize=quantize),
}


def on(backend: str, call: Callable[[], object]) -> list[torch.Tensor]:
    torch.manual_seed(3)  # of the dropout
    with fastattn.set_backend(backend):
        outputs = call()
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


@pytest.mark.parametrize("name", CALLS)
def test_kernels_and_pytorch_agree(name: str) -> None:
    found, expected = [], []
    for backend, results in (("triton", found), ("torch", expected)):
        x = X.clone().requires_grad_()
        outputs = on(backend, lambda x=x: CALLS[name](x))
        total = sum((output * (3 + i)).square().sum() for i, output in enumerate(outputs))
        results += [*(output.detach() for output in outputs), *torch.autograd.grad(total, x)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("quantize", ["int8", "fp8"])
def test_quantized_kernels_and_pytorch_agree(name: str, quantize: str) -> None:
    found, expected = (on(backend, lambda: QUANTIZED[name](quantize)) for backend in ("triton", "torch"))
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-5, atol=1e-6)
    # A value beside a tie may round the other way.
    difference = (found[0].float() - expected[0].float()).abs() * found[1]
    assert (difference <= 0.13 * found[0].float().abs() * found[1] + 1.01 * found[1]).all()
    assert (difference > 0).float().mean() < 0.01


def test_float64_runs_in_pytorch() -> None:
    x = X.double()
    found = on("triton", lambda: ops.layer_norm(x, None, None, 1e-3))[0]
    torch.testing.assert_close(
        found, torch.nn.functional.layer_norm(x, (24,), eps=1e-3), rtol=1e-12, atol=1e-12
    )
