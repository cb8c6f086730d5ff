"""What is done with a model is done with a quantized or pruned one, too: verify, benchmark, export, load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.bench import Workload

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.model

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
    "vocab_size": 99, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def encoder() -> Any:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


@pytest.mark.parametrize("scheme", ["int8", "int8-weight", "int4-weight"])
def test_verify_holds_a_quantized_swap_to_what_its_rounding_costs(encoder: Any, scheme: str) -> None:
    fastattn.prune(encoder, heads=1, ffn=0.25)
    fastattn.quantize(encoder, scheme, max_error=1.0)
    fastattn.optimize(encoder)
    report = fastattn.verify(encoder, cases=["right padding", "left padding", "one token", "gradients"])
    rounded = [each for each in report.results if each.case != "gradients" and each.tolerance > 1e-4]
    assert report.passed and bool(rounded) == (scheme == "int8")


def test_verify_still_finds_a_wrong_quantized_layer(encoder: Any) -> None:
    fastattn.quantize(encoder, "int8")
    reference = copy.deepcopy(encoder)
    fastattn.optimize(encoder)
    encoder.encoder.layer[1].intermediate.dense.weight_scale *= 1.5
    with pytest.raises(fastattn.VerificationError):
        fastattn.verify(encoder, reference, cases=["right padding"])


def test_a_quantized_model_is_benchmarked_not_called_wrong(encoder: Any) -> None:
    fastattn.quantize(encoder, "int8")
    result = fastattn.benchmark(
        encoder, device="cpu", contenders=["eager", "sdpa", "fastattn"], dtypes=["fp32"], budget_s=0.1,
        workloads=[Workload(2, 16, 0.5)],
    )  # fmt: skip
    assert [row.status for row in result.measurements[0].rows] == ["measured"] * 3


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["int8", "int4-weight"])
def test_a_pruned_and_quantized_model_is_exported_and_loaded(
    encoder: Any, scheme: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    fastattn.prune(encoder, heads=1, ffn=0.25)
    fastattn.quantize(encoder, scheme, max_error=1.0)
    saved, exported = tmp_path / "saved", tmp_path / "exported"
    encoder.save_pretrained(saved)
    loaded = fastattn.load(saved)
    result = fastattn.export(loaded, exported)
    assert (result.loss is not None) == (scheme == "int8")
    batch = {
        "input_ids": torch.arange(1, 21).view(2, 10),
        "attention_mask": torch.ones(2, 10, dtype=torch.int64),
    }
    with torch.inference_mode():
        expected, again = encoder(**batch).last_hidden_state, loaded(**batch).last_hidden_state
    assert torch.equal(expected, again)
    found = fastattn.load(exported)(**batch).last_hidden_state
    cosines = torch.cosine_similarity(found, expected, dim=-1)
    assert float(cosines.min()) > (0.98 if scheme == "int8" else 0.9999)
