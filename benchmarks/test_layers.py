"""One BERT-base layer, untouched (SDPA) against swapped, with and without padding in the batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastattn
from fastattn.bench import Workload

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("fill", [1.0, 0.47])
def test_bert_layer(versus: Any, device: str, fill: float) -> None:
    """An encoder of one layer: the packing that a whole model pays once is in its time."""
    workload = Workload(batch=8, seq=128, fill=fill)
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=1)
    model = transformers.BertModel(config, add_pooling_layer=False).eval().to(device)
    mask = workload.tokens(1000, device=device)["attention_mask"]
    hidden = torch.randn(workload.batch, workload.seq, config.hidden_size).to(device)
    swapped = copy.deepcopy(model)
    fastattn.optimize(swapped)
    versus(
        f"BERT layer, {workload}",
        lambda: model(inputs_embeds=hidden, attention_mask=mask),
        lambda: swapped(inputs_embeds=hidden, attention_mask=mask),
        mask=mask,
        budget_s=2.0,
    )
