"""Shared fixtures: small real architectures, the pretrained MiniLM, and the data folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

# On tensors this small a second thread costs more than it computes: twice the time, where suites run side by
# side. The processes that tests start inherit it.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes what the developer's machine was tuned to."""
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path_factory.getbasetemp() / "no-cache"))


@pytest.fixture(scope="module")
def brief_speed() -> Iterator[None]:
    """A verified export also measures its speed, for seconds: here for no longer than a figure takes."""
    from fastattn.onnx.checks import speed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "measure_speed", partial(speed.measure_speed, budget_s=0.01))
        yield


@pytest.fixture
def data_folder() -> Path:
    folder = os.environ.get("FASTATTN_DATA")
    if not folder:
        pytest.skip("FASTATTN_DATA names no folder with the data sets")
    return Path(folder)


@pytest.fixture
def bert_config():
    """BERT's architecture, small, with head and MLP sizes that are no powers of two."""
    transformers = pytest.importorskip("transformers")
    return transformers.BertConfig(
        vocab_size=400,
        hidden_size=60,
        num_attention_heads=3,
        num_hidden_layers=3,
        intermediate_size=144,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def _minilm():
    from fastattn.cli.models import load_model

    return load_model("minilm")


@pytest.fixture
def minilm(_minilm):
    """The pretrained all-MiniLM-L6-v2 (untouched, a copy a test) and its tokenizer."""
    import copy

    model, tokenizer = _minilm
    return copy.deepcopy(model), tokenizer
