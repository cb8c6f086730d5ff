"""What is special to one encoder family or another; what holds for all is in test_families.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from family_models import BY_NAME, assert_same, batch, build
from torch import nn

import fastattn
from fastattn.models.packed_attention import packed_attention
from fastattn.packing import Packing

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

PACKED = (
    "RoBERTa",
    "DistilBERT",
    "ELECTRA",
    "ALBERT",
    "MPNet",
    "DeBERTa-v3",
    "DeBERTa-v2 xlarge",
    "ModernBERT",
)


def both(name, **changes):
    """The untouched eager model and an optimized one."""
    case = BY_NAME[name]
    return build(case, case.base, "eager", **changes), build(case, case.base, **changes)


@pytest.mark.parametrize("name", PACKED)
@torch.no_grad()
def test_linear_layers_see_real_tokens_alone(name, monkeypatch):
    _, model = both(name)
    fastattn.optimize(model, padding="packed")
    inputs = batch(model, "right")
    real, rows = int(inputs["attention_mask"].sum()), []
    forward = nn.Linear.forward

    def counted(self, x):
        rows.append(x.shape[:-1].numel())
        return forward(self, x)

    packings = []
    from_mask = Packing.from_mask
    monkeypatch.setattr(nn.Linear, "forward", counted)
    monkeypatch.setattr(Packing, "from_mask", lambda mask: packings.append(from_mask(mask)) or packings[-1])
    model(**inputs)
    # A stack, or layers that hand on to one another, packs once.
    assert len(packings) == 1
    # At least three in each of three layers; others read embeddings, first tokens or distances.
    assert rows.count(real) >= 3 * 3, rows


@pytest.mark.parametrize("name", ["DeBERTa-v3", "DeBERTa-v2 xlarge"])
@torch.no_grad()
def test_deberta_where_lengths_are_not_read(name, monkeypatch):
    """As on a GPU, where attention runs over the padded batch and all else over real tokens."""
    reference, model = both(name)
    fastattn.optimize(model, padding="packed")
    inputs = batch(model, "right")
    from_mask = Packing.from_mask
    monkeypatch.setattr(Packing, "from_mask", lambda mask: replace(from_mask(mask), bounds=None))
    assert_same(model(**inputs), reference(**inputs), inputs)


@pytest.mark.parametrize(
    "changes",
    [
        {"relative_attention": False, "pos_att_type": None},
        {"share_att_key": False, "pos_att_type": ["c2p"]},
        {"share_att_key": False, "pos_att_type": ["p2c"], "position_buckets": -1},
    ],
    ids=["absolute", "content-to-position", "position-to-content"],
)
@torch.no_grad()
def test_deberta_terms(changes):
    reference, model = both("DeBERTa-v3", **changes)
    fastattn.optimize(model, padding="packed")
    inputs = batch(model, "right")
    assert_same(model(**inputs), reference(**inputs), inputs)


@torch.no_grad()
def test_mpnet_masks_that_are_not_padding():
    """A mask of four dimensions is the caller's own: it may hide any key from any query, or weaken it."""
    reference, model = both("MPNet")
    fastattn.optimize(model)
    inputs = batch(model, "none")
    rows, length = inputs["input_ids"].shape
    causal = torch.zeros(rows, 1, length, length).masked_fill(
        ~torch.ones(length, length, dtype=torch.bool).tril(), torch.finfo(torch.float32).min
    )
    weaker = torch.zeros(rows, 1, length, length)
    weaker[..., 3:] = -1.5
    for mask in (causal, weaker):
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": mask}
        assert_same(model(**inputs), reference(**inputs), {})


@pytest.mark.parametrize("exclude", ["*.attn", "encoder"])
@torch.no_grad()
def test_mpnet_in_part(exclude):
    reference, model = both("MPNet")
    fastattn.optimize(model, exclude=[exclude])
    for kind in ("right", "left"):
        inputs = batch(model, kind)
        assert_same(model(**inputs), reference(**inputs), inputs)


@pytest.mark.parametrize("name", ["DistilBERT", "ALBERT", "RoBERTa"])
@torch.no_grad()
def test_chunked_feed_forward(name):
    reference, model = both(name, chunk_size_feed_forward=1)
    fastattn.optimize(model)
    inputs = batch(model, "right")
    assert_same(model(**inputs), reference(**inputs), inputs)


def test_a_bias_for_each_sequence_follows_it():
    """On a CPU packed sequences are sorted by length."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.tensor([4, 6, 1, 4])[:, None]
    packing = Packing.from_mask(mask)
    bias = torch.randn(4, 2, 6, 6, generator=generator)
    query, key, value = torch.randn(3, 4, 2, 6, 8, generator=generator)
    packed = (packing.pack(x.transpose(1, 2).flatten(2)).unflatten(2, (2, 8)) for x in (query, key, value))
    found = packed_attention(
        *(x.transpose(1, 2) for x in packed), packing, scale=0.5, position_bias=bias
    ).flatten(2)
    expected = fastattn.ops.attention(query, key, value, mask=mask, bias=bias, scale=0.5)
    torch.testing.assert_close(
        packing.unpack(found)[mask], expected.transpose(1, 2).flatten(2)[mask], rtol=1e-5, atol=1e-5
    )
