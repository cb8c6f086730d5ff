"""A batch that tuning runs padded has the answers, the zeros and the gradients of the packed one."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastattn
from fastattn.layers import TransformerEncoder, TransformerEncoderLayer
from fastattn.packing import Packing, PackingThreshold

transformers = pytest.importorskip("transformers")

ALWAYS = PackingThreshold("cpu", ((32, 0.0),))
SMALL = dict(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
BART = dict(
    vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48,
)  # fmt: skip
T5 = dict(vocab_size=97, d_model=32, d_kv=16, num_heads=2, num_layers=2, d_ff=48)
FAMILIES = {
    "Bert": SMALL,
    "Albert": {**SMALL, "embedding_size": 16},
    "MPNet": SMALL,
    "ModernBert": {**SMALL, "pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 4},
    "DebertaV2": {**SMALL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "Bart": BART,
    "MBart": BART,
    "T5": T5,
}


def encoder(family: str) -> Any:
    """The swapped encoder, of a whole model, with weights wide enough for every mask and bias to show."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}Model")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fastattn.optimize(model)
    return model.get_encoder() if config.is_encoder_decoder else model


def batch(left: bool = False) -> dict[str, torch.Tensor]:
    lengths = torch.tensor([8, 5, 8, 7])[:, None]
    position = torch.arange(8)
    mask = (position >= 8 - lengths if left else position < lengths).long()
    return {"input_ids": torch.randint(4, 97, (4, 8)) * mask, "attention_mask": mask}


def given_threshold(model: Any, threshold: PackingThreshold) -> Any:
    """What `optimize` does where a tuned threshold is stored."""
    for module in model.modules():
        if hasattr(type(module), "fastattn_threshold"):
            module.__dict__["fastattn_threshold"] = threshold
    return model


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every mask that is packed."""
    packed: list[Any] = []
    original = Packing.from_mask
    monkeypatch.setattr(
        Packing, "from_mask", classmethod(lambda cls, mask: packed.append(mask) or original(mask))
    )
    return packed


@pytest.mark.model
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_answers_alike(family: str, packings: list[Any]) -> None:
    model = encoder(family)
    dense = given_threshold(copy.deepcopy(model), ALWAYS)
    for left in (False, True) if family in ("Bert", "Albert", "Bart", "MBart") else (False,):
        inputs = batch(left)
        with torch.no_grad():
            expected = model(**inputs).last_hidden_state
            packings.clear()
            found = dense(**inputs).last_hidden_state
        assert bool(packings) == (family == "DebertaV2"), "only DeBERTa packs whatever the fill"
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= 1e-5 * scale
        computed = inputs["attention_mask"].bool() | (torch.arange(8) == 0)
        assert (found[~computed] == 0).all() and (found[computed] != 0).any(-1).all()


@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_nn_answers_alike(batch_first: bool, packings: list[Any]) -> None:
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(32, 2, 48, dropout=0.0, batch_first=batch_first)
    model = TransformerEncoder(layer, 2, torch.nn.LayerNorm(32)).eval()
    torch.nn.init.normal_(model.norm.bias)
    dense = given_threshold(copy.deepcopy(model), ALWAYS)
    hidden = batch()["attention_mask"] == 0
    x = torch.randn(4, 8, 32) if batch_first else torch.randn(8, 4, 32)
    expected = model(x, src_key_padding_mask=hidden)
    packings.clear()
    found = dense(x, src_key_padding_mask=hidden)
    assert not packings and torch.allclose(found, expected, atol=1e-5)
    assert (found[hidden if batch_first else hidden.T] == 0).all()


@pytest.mark.model
def test_gradients_agree() -> None:
    model = encoder("Bert")
    dense = given_threshold(copy.deepcopy(model), ALWAYS)
    inputs = batch()
    for each in (model, dense):
        each(**inputs).last_hidden_state.square().sum().backward()
    for (name, expected), found in zip(model.named_parameters(), dense.parameters(), strict=True):
        if expected.grad is not None:
            scale = expected.grad.abs().max().clamp(min=1e-3)
            assert (found.grad - expected.grad).abs().max() <= 1e-4 * scale, name


@pytest.mark.model
def test_only_full_batches_of_auto_run_padded(packings: list[Any]) -> None:
    model = encoder("Bert")
    inputs = batch()  # 28 of 32 positions
    for padding, fill, packs in (
        ("auto", 0.8, False),
        ("auto", 0.9, True),
        ("auto", 1.0, True),
        ("packed", 0.0, True),
    ):
        fastattn.optimize(model, padding=padding)
        given_threshold(model, PackingThreshold("cpu", ((32, fill),)))
        packings.clear()
        with torch.no_grad():
            model(**inputs)
        assert bool(packings) == packs, (padding, fill)
    fastattn.optimize(model, padding="padded")
    given_threshold(model, ALWAYS)
    with torch.no_grad():
        padding = model(**inputs).last_hidden_state[inputs["attention_mask"] == 0]
    assert padding.any(), '"padded" leaves at padded positions what the model computes there'


@pytest.mark.model
def test_it_compiles_and_serves_eight_threads() -> None:
    model = encoder("Bert")
    batches = [batch() for _ in range(2)] + [{**batch(), "attention_mask": torch.eye(8)[:4].long() | 1}]
    # One with holes is packed, full ones are padded, one without padding is neither.
    batches[1]["attention_mask"] = batches[1]["attention_mask"] * (torch.arange(8) % 3 != 2)
    with torch.no_grad():
        expected = [model(**each).last_hidden_state for each in batches]
        given_threshold(model, PackingThreshold("cpu", ((32, 0.8),)))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda each: model(**each).last_hidden_state, batches * 8))
        for index, each in enumerate(found):
            assert torch.allclose(each, expected[index % 3], atol=1e-4), index
        compiled = torch.compile(model, fullgraph=True, backend="eager")(**batches[0]).last_hidden_state
    real = batches[0]["attention_mask"].bool()
    assert torch.allclose(compiled[real], expected[0][real], atol=1e-4)


def test_a_batch_goes_by_the_nearest_size() -> None:
    threshold = PackingThreshold("cpu", ((128, 1.0), (1024, 0.5)))
    mask = torch.ones(4, 256, dtype=torch.bool)
    mask[0, 100:] = False
    assert threshold.is_dense(mask) and threshold.is_dense(mask[:2])
    assert not threshold.is_dense(mask[:1]), "at 256 positions 128 is nearer than 1,024"
    assert not threshold.is_dense(torch.ones_like(mask)), "nothing is left to zero"
    assert not PackingThreshold("cuda", threshold.fills).is_dense(mask)
    assert not PackingThreshold("cpu", ()).is_dense(mask)
    with FakeTensorMode() as mode:
        assert not threshold.is_dense(mode.from_tensor(mask)), "a graph packs for every batch alike"


@pytest.mark.parametrize("fills", [((0, 0.5),), ((8, 1.5),), ((8, -0.1),)])
def test_a_threshold_that_means_nothing_is_refused(fills: Any) -> None:
    with pytest.raises(ValueError, match="it must hold pairs"):
        PackingThreshold("cpu", fills)
