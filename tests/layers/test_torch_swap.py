"""torch.nn's layers swapped inside a user's model: report, parity, verify, restore, copies, exceptions."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch_pairs import assert_close, assert_same_gradients, gradients, padding, varied_sum

import fastattn
import fastattn.layers

N = 24


class Block(nn.Module):
    """Written by hand, with layers of torch.nn's or of ours."""

    def __init__(self, attention=nn.MultiheadAttention):
        super().__init__()
        self.attention = attention(N, 4, batch_first=True)
        self.norm = nn.LayerNorm(N)
        self.expand, self.contract = nn.Linear(N, 40), nn.Linear(40, N)

    def forward(self, x, key_padding_mask=None):
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=key_padding_mask, need_weights=False)[0])
        return x + self.contract(nn.functional.gelu(self.expand(x)))


class Classifier(nn.Module):
    def __init__(self, attention=nn.MultiheadAttention, encoder=nn.TransformerEncoder, norm_first=False):
        super().__init__()
        layer = nn.TransformerEncoderLayer(N, 4, 40, batch_first=True, norm_first=norm_first)
        self.encoder = encoder(layer, 2, enable_nested_tensor=not norm_first)
        self.block = Block(attention)
        self.head = nn.Linear(N, 3)

    def forward(self, x, key_padding_mask=None):
        x = self.block(self.encoder(x, src_key_padding_mask=key_padding_mask), key_padding_mask)
        return self.head(x[:, 0])


def classifier(**options):
    torch.manual_seed(0)
    return Classifier(**options).eval()


def batch():
    return {"x": torch.randn(3, 7, N), "key_padding_mask": padding([7, 4, 1], 7)}


def classes(model):
    return [type(module) for module in model.modules()]


def test_a_model_is_swapped_and_restored_exactly():
    model = classifier()
    state, before, inputs = copy.deepcopy(model.state_dict()), classes(model), batch()
    parameters = list(model.parameters())
    own = [dict(module.__dict__) for module in model.modules()]
    expected = model(**inputs)
    report = fastattn.optimize(model)
    kinds = [site.kind for site in report.sites]
    assert report.swapped == len(report.sites) == 6
    assert sorted(kinds) == ["attention"] * 3 + ["encoder"] + ["residual_norm"] * 2
    assert [kind.__name__ for kind in classes(model)] == [kind.__name__ for kind in before]
    assert list(model.state_dict()) == list(state)
    assert_close(model(**inputs), expected)
    assert fastattn.optimize(model).swapped == 6
    fastattn.restore(model)
    assert classes(model) == before
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for module, attributes in zip(model.modules(), own, strict=True):
        assert module.__dict__.keys() == attributes.keys()
    assert torch.equal(model(**inputs), expected)


@pytest.mark.parametrize("norm_first", [False, True])
def test_training_gives_the_same_gradients(norm_first):
    reference = classifier(norm_first=norm_first).train()
    for module in reference.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    model, inputs = copy.deepcopy(reference), batch()
    with fastattn.optimized(model, padding="packed"):
        found = model(**inputs)
        expected = reference(**inputs)
        assert_close(found, expected)
        assert_same_gradients(gradients(model, varied_sum(found)), gradients(reference, varied_sum(expected)))
    assert classes(model) == classes(reference)


def test_verify_passes_and_finds_a_planted_error(monkeypatch):
    model = classifier()
    fastattn.optimize(model)
    assert fastattn.verify(model, inputs=batch()).passed
    attended = fastattn.layers.MultiheadAttention.attended

    def wrong(self, *args):
        return 1.01 * attended(self, *args)

    monkeypatch.setattr(fastattn.layers.MultiheadAttention, "attended", wrong)
    with pytest.raises(fastattn.VerificationError):
        fastattn.verify(model, inputs=batch())


def test_a_model_built_from_our_layers_verifies_and_can_be_optimized():
    model = classifier(
        attention=fastattn.layers.MultiheadAttention, encoder=fastattn.layers.TransformerEncoder
    )
    assert fastattn.verify(model, inputs=batch()).passed
    report = fastattn.optimize(model, padding="packed")
    assert report.swapped == 6 and model.encoder.fastattn_padding == "packed"
    assert fastattn.verify(model, inputs=batch()).passed


def test_swapped_models_are_copied_pickled_and_loaded():
    model, inputs = classifier(), batch()
    reference = copy.deepcopy(model)
    fastattn.optimize(model)
    expected = model(**inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert classes(again) == classes(model)
        assert torch.equal(again(**inputs), expected)
        fastattn.restore(again)
        assert classes(again) == classes(reference)
    model.load_state_dict(reference.state_dict(), assign=True)
    assert torch.equal(model(**inputs), expected)


class OwnAttention(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


class OwnLayer(nn.TransformerEncoderLayer):
    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


def test_subclasses_instance_forwards_and_exclusions_are_left_alone_by_name():
    model = classifier(attention=OwnAttention)
    original = model.encoder.layers[1].forward
    model.encoder.layers[1].forward = lambda *args, **kwargs: 2 * original(*args, **kwargs)
    reference, inputs = copy.deepcopy(model), batch()
    reference.encoder.layers[1].forward = lambda *args, **kwargs: (
        2 * type(original.__self__).forward(reference.encoder.layers[1], *args, **kwargs)
    )
    expected = reference(**inputs)
    report = fastattn.optimize(model, exclude=["encoder.layers.0.self_attn"])
    reasons = {site.name: site.reason for site in report.sites if site.status == "skipped"}
    assert reasons.keys() == {"block.attention", "encoder.layers.1", "encoder.layers.0.self_attn"}
    assert "subclass" in reasons["block.attention"] and "OwnAttention" in reasons["block.attention"]
    assert "instance" in reasons["encoder.layers.1"] and "excluded" in reasons["encoder.layers.0.self_attn"]
    assert_close(model(**inputs), expected)


@torch.no_grad()
def test_an_encoder_of_a_users_own_layers_is_left_alone_by_name():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(OwnLayer(N, 4, 40, batch_first=True), 2).eval()
    expected = model(torch.ones(2, 5, N))
    report = fastattn.optimize(model)
    skipped = {site.name: site.reason for site in report.sites if site.status == "skipped"}
    assert "OwnLayer" in skipped[""] and "subclass" in skipped["layers.0"]
    assert_close(model(torch.ones(2, 5, N)), expected)


def test_torch_compile_of_a_swapped_model():
    model, inputs = classifier(norm_first=True), batch()
    fastattn.optimize(model)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)
    assert_close(found, model(**inputs))


def test_a_model_without_transformer_layers_gets_the_honest_report():
    report = fastattn.optimize(nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Tanh()))
    assert report.swapped == 0 and "known family" in report.sites[0].reason
