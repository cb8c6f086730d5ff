"""torch.nn's Transformer layers and our own, pruned."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastattn
from fastattn.compress.pruning.saved import apply_shapes, shapes_of
from fastattn.compress.pruning.structure import sites

IMPORTANCES = ("magnitude", "taylor", "wanda")


class Model(nn.Module):
    def __init__(self, kinds, batch_first=True, norm_first=False):
        super().__init__()
        order = dict(batch_first=batch_first, norm_first=norm_first, activation="gelu")
        self.encoder = kinds.TransformerEncoder(kinds.TransformerEncoderLayer(32, 4, 24, **order), 3)
        self.decoder = kinds.TransformerDecoder(kinds.TransformerDecoderLayer(32, 4, 24, **order), 2)
        self.attention = kinds.MultiheadAttention(32, 4, kdim=12, vdim=20, add_bias_kv=True, batch_first=True)

    def forward(self, source, target, padding):
        memory = self.encoder(source, src_key_padding_mask=padding)
        decoded = self.decoder(target, memory, memory_key_padding_mask=padding)
        keys = torch.full((2, 3, 12), 0.3, dtype=source.dtype)
        values = torch.linspace(-1, 1, 120, dtype=source.dtype).view(2, 3, 20)
        attended, _ = self.attention(decoded.reshape(2, -1, 32), keys, values)
        return decoded, attended


def model_and_inputs(kinds, batch_first=True, norm_first=False, dtype=torch.float64):
    torch.manual_seed(0)
    model = Model(kinds, batch_first, norm_first).eval().to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    source, target = torch.randn(2, 5, 32, dtype=dtype), torch.randn(2, 4, 32, dtype=dtype)
    if not batch_first:
        source, target = source.transpose(0, 1), target.transpose(0, 1)
    return model, (source, target, torch.tensor([[False] * 5, [False] * 3 + [True] * 2]))


def selection(model):
    """Not the first layer's heads: the stack asks the first layer whether torch.nn's fast path may run."""
    structure = sites(model)
    heads = {site.name: [index % 4] for index, site in enumerate(structure.attentions) if index}
    return heads, {site.name: [1, 5, 7 + index] for index, site in enumerate(structure.feed_forwards)}


@pytest.mark.parametrize("kinds", [nn, fastattn.layers], ids=["torch.nn", "fastattn.layers"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_what_is_removed_counts_as_zero(kinds, batch_first, norm_first):
    model, inputs = model_and_inputs(kinds, batch_first, norm_first)
    heads, neurons = selection(model)
    gated, fresh = copy.deepcopy(model), copy.deepcopy(model)
    structure = sites(gated)
    with torch.no_grad():
        for site in structure.attentions:
            places = site.output.places[heads.get(site.name, [])].flatten()
            site.output.owner.weight[:, places] = 0
        for site in structure.feed_forwards:
            site.down.owner.weight[:, neurons[site.name]] = 0
        wanted = gated(*inputs)
        fused = copy.deepcopy(model)
        fastattn.optimize(fused)
        for pruned in (model, fused):
            fastattn.prune(pruned, heads=heads, ffn=neurons)
            torch.testing.assert_close(pruned(*inputs), wanted, rtol=0, atol=1e-12)
        fastattn.restore(fused)
        fastattn.optimize(model)
        for pruned in (model, fused):
            torch.testing.assert_close(pruned(*inputs), wanted, rtol=0, atol=1e-12)
        apply_shapes(fresh, shapes_of(model))
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(fresh(*inputs), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_useless_parts_go_first(importance):
    model, inputs = model_and_inputs(nn, dtype=torch.float32)
    structure = sites(model)
    heads = {site.name: index % 4 for index, site in enumerate(structure.attentions)}
    with torch.no_grad():
        for site in structure.attentions:
            site.output.owner.weight[:, site.output.places[heads[site.name]]] *= 1e-6
        for site in structure.feed_forwards:
            site.down.owner.weight[:, 3] *= 1e-6
    kept = {
        site.name: [head for head in range(4) if head != heads[site.name]] for site in structure.attentions
    }
    outputs = {
        site.name: site.output.owner.weight[:, site.output.places[kept[site.name]].flatten()].clone()
        for site in structure.attentions
    }
    fastattn.prune(model, heads=1, ffn=1, importance=importance, calibration=[inputs])
    for site in sites(model).attentions:
        assert torch.equal(site.output.owner.weight, outputs[site.name])
    for site in sites(model).feed_forwards:
        assert site.width == 23 and site.down.owner.weight.abs().amax(0).min() > 1e-4


def test_packed_as_before():
    """Pruned layers run without padding, as whole ones do, and train."""
    model, inputs = model_and_inputs(fastattn.layers, dtype=torch.float32)
    fastattn.prune(model, heads=2, ffn=0.5)
    assert all(layer.cannot_pack() is None for layer in model.encoder.layers)
    model.train()
    decoded, attended = model(*inputs)
    (decoded.sum() + attended.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_report_says_where_the_shapes_are():
    model, _ = model_and_inputs(nn)
    report = fastattn.prune(model, layers={"encoder.layers": [1]})
    assert len(model.encoder.layers) == model.encoder.num_layers == 2
    assert any("apply_shapes" in note for note in report.notes)
