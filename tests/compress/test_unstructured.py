"""Zeros anywhere: as many as asked for, the least important ones, and kept while training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fastattn.compress.pruning.unstructured import prune_unstructured
from fastattn.compress.pruning.weights import held_zeros


def layers():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(20, 16), encoder, nn.Linear(16, 5)).eval()


def batches():
    return [torch.randint(0, 20, (2, 7), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "wanda"])
def test_every_layer_loses_its_share_and_the_rest_is_as_it_was(importance):
    model = layers()
    before = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    report = prune_unstructured(model, 0.3, importance, batches())
    pruned = {
        "1.self_attn.in_proj_weight", "1.self_attn.out_proj.weight", "1.linear1.weight", "1.linear2.weight"
    }  # fmt: skip
    for name, old in before.named_parameters():
        new = dict(model.named_parameters())[name]
        assert new is parameters[name]
        zeros = int((new == 0).sum())
        if name in pruned:
            rows = old.shape[0] if importance == "wanda" else 1
            assert zeros == rows * int(0.3 * old.numel() / rows), name
            assert torch.equal(new[new != 0], old[new != 0])
        else:
            assert torch.equal(new, old), name
    assert report.parameters_before - report.parameters_after == sum(
        int((model.get_parameter(name) == 0).sum()) for name in pruned
    )
    assert next(part for part in report.parts if part.name == "2").reason == "output head"
    assert "no time is gained" in report.table()


def test_magnitude_takes_the_smallest():
    model = layers()
    old = model[1].linear1.weight.detach().clone()
    prune_unstructured(model, 0.5)
    lost = model[1].linear1.weight == 0
    assert old[lost].abs().max() <= old[~lost].abs().min()


def test_wanda_counts_the_size_of_inputs():
    """Weights of one size: those go whose inputs are small."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.ones_(model[0].weight)
    prune_unstructured(model, 0.5, "wanda", [torch.tensor([[5.0, 0.1, 3.0, 0.2]])])
    assert model[0].weight.tolist() == [[1, 0, 1, 0]] * 3


def test_taylor_keeps_what_the_output_depends_on():
    """A neuron that the next layer does not read may lose its weights, however large."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 2, bias=False), nn.Linear(2, 4, bias=False), nn.Linear(4, 1))
    model[0].weight.data[0] *= 100
    model[1].weight.data[:, 0] = 0
    prune_unstructured(model, 0.5, "taylor", [torch.randn(8, 6)])
    assert (model[0].weight[0] == 0).all() and (model[0].weight[1] != 0).all()


def test_conv1d_is_pruned_by_output():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16)
    ).eval()
    weight = model.transformer.h[0].mlp.c_fc.weight
    tied = model.lm_head.weight.detach().clone()
    report = prune_unstructured(model, 0.5, "wanda", [{"input_ids": torch.arange(16)[None]}])
    assert ((weight == 0).sum(dim=0) == 8).all()
    assert torch.equal(model.lm_head.weight, tied)
    assert "lm_head" in {part.name for part in report.parts if part.reason}


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_keeps_the_zeros(optimizer):
    model = layers()
    prune_unstructured(model, 0.5)
    zero = {name: p == 0 for name, p in model.named_parameters() if p.dim() == 2 and name != "0.weight"}
    before = copy.deepcopy(model)
    steps = optimizer(model.parameters(), lr=0.05, weight_decay=0.1)
    with held_zeros(model):
        for batch in batches():
            steps.zero_grad()
            model.train()(batch).square().mean().backward()
            steps.step()
    for name, mask in zero.items():
        assert torch.equal(model.get_parameter(name) == 0, mask), name
    assert not torch.equal(model[1].linear1.weight, before[1].linear1.weight)
    model(batches()[0]).sum().backward()
    assert (model[1].linear1.weight.grad[zero["1.linear1.weight"]] != 0).any(), "held afterwards, too"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (dict(sparsity=1.0), r"in \[0, 1\)"),
        (dict(sparsity=-0.1), r"in \[0, 1\)"),
        (dict(sparsity=0.5, importance="random"), "must be one of"),
        (dict(sparsity=0.5, importance="wanda"), "needs calibration"),
        (dict(sparsity=0.5, exclude=["nowhere"]), "'nowhere'"),
    ],
)
def test_bad_input_is_told_and_nothing_changes(arguments, said):
    model = layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=said):
        prune_unstructured(model, **arguments)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
