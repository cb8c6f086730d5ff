"""A pruned model exports, verified, and what was exported generates as it does."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.compress.pruning.structure import sites

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

pytestmark = [pytest.mark.model, pytest.mark.once, pytest.mark.usefixtures("brief_speed")]

GREEDY = dict(max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)


def exported(model, folder):
    fastattn.export(model, folder)
    return fastattn.load(folder)


def test_bert(tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24
    )
    model = transformers.BertForSequenceClassification(config).eval()
    first, *_ = sites(model).attentions
    fastattn.prune(model, heads={first.name: [2]}, ffn=0.3, layers={"bert.encoder.layer": [1]})
    ids = torch.randint(1, 50, (2, 7))
    found = exported(model, tmp_path)(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(torch.as_tensor(found), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_gpt2_with_caches_of_different_widths(tmp_path):
    config = transformers.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    fastattn.prune(model, heads={"transformer.h.0.attn": [0, 3], "transformer.h.1.attn": [1]}, ffn=0.5)
    ids = torch.randint(1, 50, (2, 7))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    made = exported(model, tmp_path).generate(**inputs, **GREEDY)
    assert torch.equal(torch.as_tensor(made), model.generate(**inputs, **GREEDY))


def test_t5_with_fewer_heads_of_one_kind_and_fewer_layers(tmp_path):
    config = transformers.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    own = [site.name for site in sites(model).attentions if "decoder" in site.name and "Self" in site.name]
    fastattn.prune(model, heads={name: [1] for name in own}, layers={"encoder.block": 1})
    ids = torch.randint(1, 50, (2, 7))
    inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
    made = exported(model, tmp_path).generate(**inputs, **GREEDY)
    assert torch.equal(torch.as_tensor(made), model.generate(**inputs, **GREEDY))
