"""Modules of a user's own, made of torch.nn's layers or ours, exported to ONNX by an example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch_pairs import assert_close, padding

import fastattn
import fastattn.layers

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.usefixtures("brief_speed")

N, LONGEST = 24, 40


class Classifier(nn.Module):
    def __init__(self, batch_first=True, layers=nn):
        super().__init__()
        self.words = nn.Embedding(50, N)
        self.positions = nn.Parameter(0.1 * torch.randn(LONGEST, N))
        layer = layers.TransformerEncoderLayer(N, 4, 40, batch_first=batch_first, activation="gelu")
        self.encoder = layers.TransformerEncoder(layer, 2)
        self.attention = layers.MultiheadAttention(N, 4, batch_first=batch_first)
        self.head = nn.Linear(N, 3)
        self.batch_first = batch_first

    def forward(self, ids, key_padding_mask):
        x = self.words(ids) + self.positions[: ids.shape[1]]
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=key_padding_mask)
        x = x + self.attention(x, x, x, key_padding_mask=key_padding_mask, need_weights=False)[0]
        x = x if self.batch_first else x.transpose(0, 1)
        return {"logits": self.head(x[:, 0]), "states": x}


def example(lengths=(11, 4), width=11):
    ids = torch.randint(0, 50, (len(lengths), width))
    return {"ids": ids, "key_padding_mask": padding(list(lengths), width)}


@pytest.mark.parametrize("layers, batch_first", [(nn, False), (fastattn.layers, True)])
def test_a_custom_module_runs_in_onnx_runtime(layers, batch_first, tmp_path):
    torch.manual_seed(0)
    model = Classifier(batch_first, layers)
    kinds = [type(module) for module in model.modules()]
    result = fastattn.export(model, tmp_path, example_inputs=example())
    assert [type(module) for module in model.modules()] == kinds and model.training
    assert result.outputs == ("logits", "states") and result.verification.passed
    assert result.fusions["packed_attention"] == 2 and result.fusions["attention"] >= 2
    assert result.fusions["add_layer_norm"] == 4 and result.fusions["bias_gelu"] == 2
    loaded = fastattn.load(tmp_path)
    model.eval()
    for lengths, width in (((13, 2, 7, 1, 5), 13), ((1,), 1), ((3, 3, 3), 3), ((0, 6), 6)):
        batch = example(lengths, width)
        found = loaded(**batch)
        with torch.no_grad():
            expected = model(**batch)
        rows = [index for index, length in enumerate(lengths) if length]
        assert found.logits.isfinite().all()
        assert_close(found.logits[rows], expected["logits"][rows], f"{lengths}")
        real = ~batch["key_padding_mask"]
        assert_close(found.states[real], expected["states"][real], f"{lengths}")
    arrays = loaded(**{name: tensor.numpy() for name, tensor in example().items()})
    assert isinstance(arrays.logits, np.ndarray)


def test_features_as_inputs_and_one_output(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(N, 4, 40, norm_first=True)
    model = nn.TransformerEncoder(layer, 1, nn.LayerNorm(N), enable_nested_tensor=False)
    inputs = {"src": torch.randn(7, 3, N), "src_key_padding_mask": padding([7, 2, 4], 7)}
    result = fastattn.export(model, tmp_path, example_inputs=inputs)
    assert result.outputs == ("output",)
    loaded = fastattn.load(tmp_path)
    assert loaded.manifest["graphs"]["model"]["inputs"][0]["dimensions"] == ["sequence", "batch", N]
    inputs = {"src": torch.randn(5, 2, N), "src_key_padding_mask": padding([5, 1], 5)}
    real = ~inputs["src_key_padding_mask"].T
    assert_close(loaded(**inputs).output[real], model.eval()(**inputs)[real])


def test_bad_examples_are_named_and_nothing_is_written(tmp_path):
    model, folder = Classifier(), tmp_path / "out"
    for inputs, error, message in (
        ({"ids": [1, 2]}, TypeError, "ids"),
        ({"ids": torch.ones(2, 3, dtype=torch.float64)}, TypeError, "float64"),
        (example((3, 3, 3), 3), ValueError, "tell batch and sequence apart"),
        (example((3,), 3), ValueError, "tell batch and sequence apart"),
        ({"words": torch.ones(2, 3, dtype=torch.long)}, TypeError, "by name"),
    ):
        with pytest.raises(error, match=message):
            fastattn.export(model, folder, example_inputs=inputs)
    with pytest.raises(ValueError, match="example_inputs"):
        fastattn.export(model, folder)
    assert not list(tmp_path.iterdir())


def test_bad_inputs_of_a_loaded_module_are_named(tmp_path):
    fastattn.export(Classifier(), tmp_path, example_inputs=example(), verify=False)
    loaded, batch = fastattn.load(tmp_path), example()
    for inputs, error, message in (
        ({"ids": batch["ids"]}, TypeError, "key_padding_mask is missing"),
        ({**batch, "ids": batch["ids"].float()}, TypeError, "int64"),
        ({**batch, "key_padding_mask": batch["key_padding_mask"].long()}, TypeError, "bool"),
        ({**batch, "ids": batch["ids"][:, :5]}, ValueError, "sequence = 5"),
        (example((LONGEST + 1, 3), LONGEST + 1), ValueError, f"at most {LONGEST}"),
        ({**batch, "ids": batch["ids"][0]}, ValueError, r"\[batch, sequence\]"),
    ):
        with pytest.raises(error, match=message):
            loaded(**inputs)
