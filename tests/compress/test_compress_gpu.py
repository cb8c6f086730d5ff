"""Quantized, pruned and recovered models on the device they are on: a CPU here, a GPU where there is one."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastattn
from fastattn.compress import recover
from fastattn.compress.kv_cache import quantized_cache_kind
from fastattn.ops.packed_weight import SCHEMES

pytestmark = pytest.mark.model
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TOKENS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))


def classifier():
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128
    )
    return transformers.BertForSequenceClassification(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_quantized_where_it_is_answers_as_on_the_cpu(device, scheme, tmp_path):
    model = classifier()
    moved = copy.deepcopy(model).to(device)
    fastattn.optimize(moved)
    report = fastattn.quantize(moved, scheme)
    fastattn.quantize(model, scheme)
    assert report.quantized
    expected = model(TOKENS).logits
    found = moved(TOKENS.to(device)).logits
    assert found.device.type == device
    # int8 and fp8 round inputs, whose last bits differ.
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=2e-2 * expected.abs().max().item())
    moved.save_pretrained(tmp_path)
    again = fastattn.load(tmp_path)
    torch.testing.assert_close(again(TOKENS).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("device", DEVICES)
def test_generates_with_a_quantized_cache_where_the_model_is(device, kind):
    config = transformers.GPT2Config(vocab_size=97, n_embd=64, n_head=4, n_layer=2)
    model = transformers.GPT2LMHeadModel(config).eval().to(device)
    fastattn.quantize(model, "int8-weight", kv_cache=kind)
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(TOKENS.to(device), **options)
    fastattn.optimize(model)
    assert quantized_cache_kind(model) == kind
    assert torch.equal(model.generate(TOKENS.to(device), **options), expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_prunes_and_recovers_where_the_model_is(device, precision, tmp_path):
    teacher = classifier().to(device)
    student = copy.deepcopy(teacher)
    fastattn.prune(student, heads=0.5, ffn=0.5, layers=1)
    rows = [{"input_ids": TOKENS[index % 3, : 4 + index].tolist()} for index in range(8)]
    before = {name: each.clone() for name, each in student.named_parameters()}
    report = recover(student, teacher, rows * 8, output_dir=tmp_path, epochs=3, learning_rate=1e-3,
                     batch_size=8, tokenizer=_Pad(), precision=precision)  # fmt: skip
    assert next(student.parameters()).device.type == device
    assert report.history[-1]["loss"] < report.history[0]["loss"]
    assert any(not torch.equal(each, before[name]) for name, each in student.named_parameters())


class _Pad:
    """As much of a tokenizer as the batches take."""

    padding_side = "right"

    def __init__(self):
        self.deprecation_warnings = {}

    def pad(self, rows, **options):
        width = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return transformers.BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type="pt")

    def save_pretrained(self, folder):
        return ()
