"""A classifier of two labels in int8: right though a sentence is undecided, caught where a layer is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

import fastattn
from fastattn.verification import adversarial_batches
from fastattn.verification.likeness import FEW_GATES

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def undecided(new_bert):
    """Two labels of opposite sign, and a sentence among those drawn that has none of either."""
    model = new_bert("BertForSequenceClassification", num_labels=2).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
        first = model.classifier.weight[0]
        model.classifier.weight[1] = -1.1 * first
        model.classifier.bias.sub_(model(**adversarial_batches(model)["no padding"]).logits[0])
    return model


def test_a_right_export_passes_though_a_sentence_is_undecided(undecided, tmp_path):
    result = fastattn.export(undecided, tmp_path, precision="int8")
    assert result.loss["gate"] == FEW_GATES["int8"] and result.loss["cosine_mean"] > 0.99
    batch = adversarial_batches(undecided)["no padding"]
    with torch.no_grad():
        expected = undecided(**batch).logits
    found = fastattn.load(tmp_path)(**batch).logits
    assert (found[0] - expected[0]).norm() > expected[0].norm(), "rounding alone decides that sentence"


def _exchange(model: torch.nn.Module) -> None:
    for parameter in model.classifier.parameters():
        parameter.copy_(parameter.flip(0))


def _times(factor: float) -> Callable[[torch.nn.Module], None]:
    return lambda model: model.bert.encoder.layer[0].intermediate.dense.weight.mul_(factor)


@pytest.mark.parametrize("damage", [_times(2.0), _times(0.0), _exchange], ids=["x2", "x0", "labels"])
def test_an_export_with_one_wrong_layer_fails(damage, undecided, tmp_path):
    broken = copy.deepcopy(undecided)
    with torch.no_grad():
        damage(broken)
    with pytest.raises(fastattn.VerificationError, match=r"int8 must keep 0\.98"):
        fastattn.export(broken, tmp_path / "out", precision="int8", reference=undecided)
    assert not (tmp_path / "out").exists()
