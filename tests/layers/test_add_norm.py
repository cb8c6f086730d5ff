"""AddLayerNorm and AddRMSNorm against dropout, addition and torch.nn's norm, one after another."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch_pairs import assert_close

from fastattn.layers import AddLayerNorm, AddRMSNorm

PAIRS = [(AddLayerNorm, nn.LayerNorm), (AddRMSNorm, nn.RMSNorm)]


@pytest.mark.parametrize("ours, theirs", PAIRS)
@pytest.mark.parametrize(
    "options", [{}, {"eps": 0.1}, {"elementwise_affine": False}, {"normalized_shape": (4, 6)}], ids=str
)
def test_normalized_and_sum(ours, theirs, options):
    options = {"normalized_shape": 24, **options}
    fused, plain = ours(**options), theirs(**options)
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    fused.load_state_dict(plain.state_dict())
    shape = (3, 5, 24) if options["normalized_shape"] == 24 else (3, 5, 4, 6)
    x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
    normalized, total = fused(x, residual)
    assert_close(total, x + residual)
    expected = plain(x + residual)
    assert_close(normalized, expected)
    wanted = [x, residual, *fused.parameters()]
    found = torch.autograd.grad((normalized * residual.detach() + total).sum(), wanted)
    wanted = [x, residual, *plain.parameters()]
    for got, want in zip(
        found, torch.autograd.grad((expected * residual.detach() + x + residual).sum(), wanted), strict=True
    ):
        assert_close(got, want)


def test_without_bias():
    fused, plain = AddLayerNorm(8, bias=False), nn.LayerNorm(8, bias=False)
    x = torch.randn(2, 8)
    assert list(fused.state_dict()) == list(plain.state_dict()) == ["weight"]
    assert_close(fused(x, x)[0], plain(x + x))


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_dropout_counts_in_training_only(ours, theirs):
    fused = ours(24, dropout=0.5)
    x, residual = torch.ones(50, 24), torch.zeros(50, 24)
    _, total = fused(x, residual)
    assert set(total.unique().tolist()) == {0.0, 2.0}
    assert_close(fused.eval()(x, residual)[1], x)
    assert "dropout=0.5" in repr(fused) and isinstance(fused, theirs)
    assert_close(copy.deepcopy(fused)(x, residual)[0], fused(x, residual)[0])


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_torch_compile(ours, theirs):
    fused, x = ours(24), torch.randn(2, 3, 24)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, x), fused(x, x), strict=True):
        assert_close(got, want)


@pytest.mark.parametrize("ours, theirs", PAIRS)
def test_bad_arguments_are_named(ours, theirs):
    with pytest.raises(ValueError, match="dropout is 2"):
        ours(8, dropout=2)
    with pytest.raises(ValueError, match="x and residual"):
        ours(8)(torch.ones(2, 8), torch.ones(2, 7))
