"""What int8 costs a pretrained model: all-MiniLM-L6-v2 on STS-B, against its own float32 export."""

from __future__ import annotations

import csv

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
import onnxruntime

from fastattn.onnx.quantization import quantize

PAIRS = 300


@pytest.fixture(scope="module")
def exported(_minilm, tmp_path_factory):
    import copy

    import fastattn

    model, tokenizer = _minilm
    folder = tmp_path_factory.mktemp("minilm")
    fastattn.export(copy.deepcopy(model), folder, tokenizer=tokenizer, verify=False)
    return folder, tokenizer


@pytest.fixture
def pairs(data_folder):
    with open(data_folder / "stsb" / "dev.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[:PAIRS]
    return [r[0] for r in rows], [r[1] for r in rows], np.array([float(r[2]) for r in rows])


def batches(tokenizer, texts, size=50):
    for start in range(0, len(texts), size):
        encoded = tokenizer(texts[start : start + size], padding=True, return_tensors="np")
        yield {name: array.astype(np.int64) for name, array in encoded.items()}


def calibration(tokenizer, data_folder):
    with open(data_folder / "stsb" / "train.csv", newline="", encoding="utf-8") as file:
        texts = [row[0] for row in csv.reader(file)][::20]
    return batches(tokenizer, texts[:250])


def embedded(path, tokenizer, texts):
    """Every real token's hidden state [tokens, 384], and the sentences' means [texts, 384] of length 1."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens, sentences = [], []
    for batch in batches(tokenizer, texts):
        hidden = session.run(["last_hidden_state"], batch)[0]
        mask = batch["attention_mask"].astype(bool)
        tokens.append(hidden[mask])
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        sentences.append(means / np.linalg.norm(means, axis=1, keepdims=True))
    return np.concatenate(tokens), np.concatenate(sentences)


def spearman(x, y):
    def ranks(values):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return np.corrcoef(ranks(x), ranks(y))[0, 1]


def measure(path, tokenizer, pairs):
    (first, left), (second, right) = (embedded(path, tokenizer, texts) for texts in pairs[:2])
    return np.concatenate([first, second]), spearman((left * right).sum(1), pairs[2])


@pytest.mark.parametrize(
    "precision, calibrated, cosine",
    [("int8", False, 0.99), ("int8", True, 0.998), ("int8-weight", False, 0.998)],
)
def test_tokens_and_similarities_of_a_pretrained_encoder(
    precision, calibrated, cosine, exported, pairs, data_folder, tmp_path
):
    folder, tokenizer = exported
    model = ir.load(folder / "model.onnx")
    batches = calibration(tokenizer, data_folder) if calibrated else None
    decisions = quantize(model, precision, provider="CPUExecutionProvider", calibration=batches)
    ir.save(model, tmp_path / "quantized.onnx")
    assert [each["count"] for each in decisions if each["what"] == "products" and "count" in each] == [37]
    share = (tmp_path / "quantized.onnx").stat().st_size / (folder / "model.onnx").stat().st_size
    assert share <= (0.26 if precision == "int8" and not calibrated else 0.265)
    wanted, correlation = measure(folder / "model.onnx", tokenizer, pairs)
    found, quantized_correlation = measure(tmp_path / "quantized.onnx", tokenizer, pairs)
    cosines = (found * wanted).sum(1) / (np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1))
    assert cosines.mean() >= cosine, f"{cosines.mean():.6f}, at worst {cosines.min():.6f}"
    assert abs(quantized_correlation - correlation) <= 0.003
