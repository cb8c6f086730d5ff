"""The bfloat16 linear layer of x86 CPUs: as exact as PyTorch's, and left alone where it could not be."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu

from fastattn.layers.onednn import onednn_linear

SHAPES = [(1, 5, 32), (3, 7, 32), (2, 1, 32), (11, 32)]


@pytest.fixture(autouse=True)
def needs_bfloat16() -> None:
    if (
        onednn_linear(
            torch.ones(1, 2, dtype=torch.bfloat16), nn.Linear(2, 2).bfloat16().requires_grad_(False)
        )
        is None
    ):
        pytest.skip("this processor has no bfloat16 products in oneDNN")


def layer(bias: bool = True) -> nn.Linear:
    return nn.Linear(32, 48, bias=bias).bfloat16()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("after", ["nothing", "gelu", "gelu_tanh", "residual"])
@torch.no_grad()
def test_as_exact_as_pytorch(shape: tuple[int, ...], bias: bool, after: str) -> None:
    torch.manual_seed(0)
    linear, x = layer(bias), torch.randn(shape).bfloat16()
    residual = torch.randn(*shape[:-1], 48).bfloat16()
    exact_layer = nn.Linear(32, 48, bias=bias).double()
    exact_layer.load_state_dict(linear.state_dict())
    kept = residual.clone()
    if after == "residual":
        ours = onednn_linear(x, linear, residual=residual)
        pytorch, exact = linear(x) + residual, exact_layer(x.double()) + residual.double()
    elif after == "nothing":
        ours, pytorch, exact = onednn_linear(x, linear), linear(x), exact_layer(x.double())
    else:
        approximate = "tanh" if after == "gelu_tanh" else "none"
        ours = onednn_linear(x, linear, gelu=approximate)
        pytorch = gelu(linear(x), approximate=approximate)
        exact = gelu(exact_layer(x.double()), approximate=approximate)
    assert ours is not None and ours.shape == exact.shape and ours.dtype == torch.bfloat16
    error, own = (ours.double() - exact).abs().max(), (pytorch.double() - exact).abs().max()
    assert error <= 2 * own + 2 * torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert torch.equal(residual, kept), "the residual is the caller's"


def test_left_alone_where_a_gradient_is_needed_or_autocast_decides() -> None:
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    assert onednn_linear(x, layer()) is None
    frozen = layer().requires_grad_(False)
    assert onednn_linear(x, frozen) is not None
    only_bias = layer()
    only_bias.weight.requires_grad_(False)
    assert onednn_linear(x, only_bias) is None, "training biases alone is a way to fine-tune"
    assert onednn_linear(x.clone().requires_grad_(), frozen) is None
    assert onednn_linear(x, frozen, residual=torch.randn(3, 48).bfloat16().requires_grad_()) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert onednn_linear(x, frozen) is None
    with torch.backends.mkldnn.flags(enabled=False):
        assert onednn_linear(x, frozen) is None


@pytest.mark.parametrize("given", ["float32", "float32 weight", "strided", "no rows", "float32 residual"])
def test_left_alone_where_the_primitive_does_not_take_it(given: str) -> None:
    linear, residual = layer().requires_grad_(False), None
    x = torch.randn(4, 32).bfloat16()
    if given == "float32":
        x, linear = x.float(), linear.float()
    elif given == "float32 weight":
        linear = linear.float()
    elif given == "strided":
        x = torch.randn(32, 4).bfloat16().T
    elif given == "no rows":
        x = x[:0]
    else:
        residual = torch.randn(4, 48)
    assert onednn_linear(x, linear, residual=residual) is None


def test_changed_weights_are_seen() -> None:
    """Nothing of a weight is kept: an optimizer that writes through `.data` is seen by the next call."""
    linear, x = layer().requires_grad_(False), torch.randn(4, 32).bfloat16()
    before = onednn_linear(x, linear)
    linear.weight.data.mul_(2)
    linear.bias.data.mul_(2)
    after = onednn_linear(x, linear)
    assert before is not None and after is not None
    torch.testing.assert_close(after, before * 2, rtol=2e-2, atol=2e-2)
