"""Two zeros in every four weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from fastattn.compress.pruning.semi_structured import SemiStructuredLinear, prune_2_4, use_sparse_kernels


def layers(width: int = 64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width), nn.GELU(), nn.Linear(width, 3)
    )


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "wanda"])
def test_of_every_four_the_two_least_go(importance):
    model = layers()
    before = copy.deepcopy(model)
    x = torch.randn(16, 64)
    x[:, ::2] *= 10
    prune_2_4(model, importance, [x])
    for index in (0, 2):
        new, old = model[index].weight.detach(), before[index].weight.detach()
        assert (new.reshape(-1, 4).count_nonzero(dim=1) == 2).all()
        assert torch.equal(new[new != 0], old[new != 0])
    assert torch.equal(model[4].weight, before[4].weight)
    kept = (model[0].weight != 0).reshape(-1, 4)
    fours = before[0].weight.detach().abs().reshape(-1, 4)
    if importance == "magnitude":
        assert (fours.masked_fill(~kept, 9).amin(dim=1) >= fours.masked_fill(kept, 0).amax(dim=1)).all()
    if importance == "wanda":
        assert kept[:, ::2].float().mean() > 0.85, "the weights of large inputs stay"


def test_a_processor_gains_nothing_and_the_report_says_so():
    model = layers()
    report = prune_2_4(model)
    assert type(model[0]) is nn.Linear
    assert "on cpu the zeros are multiplied like any other number: no speed is gained" in report.table()
    assert report.parameters_before - report.parameters_after == 64 * 64


def test_shapes_that_do_not_fit_are_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(64, 6), nn.Linear(6, 10), nn.Linear(10, 64), nn.Linear(64, 2))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"'1' \[10, 6\], '2' \[64, 10\] are not"):
        prune_2_4(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    prune_2_4(model, exclude=["1", "2"])
    assert torch.equal(model[1].weight, before["1.weight"])


def test_the_layer_is_a_linear_layer_wherever_it_cannot_be_more():
    """Off a GPU, and where gradients are wanted, it computes, copies and pickles as the layer it was."""
    model = layers()
    prune_2_4(model)
    x = torch.randn(5, 64)
    expected = model[0](x)
    keys = list(model.state_dict())
    model[0].__class__ = SemiStructuredLinear
    assert torch.equal(model[0](x), expected) and list(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(again[0](x), expected)
    assert use_sparse_kernels(again).startswith("on cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_the_zeros_are_left_out(dtype):
    model = layers(128).to("cuda", dtype)
    report = prune_2_4(model)
    assert "2 layers multiply by PyTorch's semi-structured tensors" in report.table()
    x = torch.randn(3, 40, 128, device="cuda", dtype=dtype)
    dense = copy.deepcopy(model)
    for layer in (dense[0], dense[2]):
        layer.__class__ = nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), rtol=2e-2, atol=2e-2)
        model[0].weight.mul_(2)
        dense[0].weight.mul_(2)
        torch.testing.assert_close(model(x), dense(x), rtol=2e-2, atol=2e-2)
        model[0].weight.add_(1)
        with pytest.warns(RuntimeWarning, match="multiplied whole"):
            model(x)
    model(x).sum().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(ValueError, match="multiples of 32"):
        prune_2_4(nn.Sequential(nn.Linear(64, 20), nn.Linear(20, 64), nn.Linear(64, 2)).to("cuda", dtype))
