"""Contenders in processes of their own: the same answers, and a crash is a row."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tiny_sources import MODELS

import fastattn
from fastattn.bench import Workload

pytest.importorskip("transformers")


def test_every_task_answers_as_in_one_process() -> None:
    """Decoded, prefilled and trained in another process, in bf16, which arrays cannot hold."""
    workloads = [
        Workload(2, 8, 0.7, task="decode", new_tokens=3),
        Workload(2, 8, task="prefill"),
        Workload(2, 8, task="train"),
    ]
    result = fastattn.benchmark(
        MODELS["gpt2"](), workloads=workloads, contenders=["fastattn"], dtypes="bf16",
        budget_s=0.1, isolate=True,
    )  # fmt: skip
    for measurement in result.measurements:
        for row in measurement.rows:
            assert row.status == "measured", row
            assert row.parity is not None and row.parity.passed and row.peak_host_bytes
    decoded, _, trained = (each.row("fastattn bf16") for each in result.measurements)
    assert len(decoded.parts_ms["inter_token_ms"]) == 2 * len(decoded.parts_ms["first_token_ms"])
    assert trained.parts_ms["backward_ms"] and decoded.stages_ms


class Fatal(torch.nn.Module):
    """Ends its process as a fault in machine code does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        os.abort()


def test_a_crash_is_a_row_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    # The other process finds this file's class here.
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH")))))
    model, reference = MODELS["bert"](), MODELS["bert"]()
    fastattn.optimize(model)
    model.encoder.layer[0].output.dense = Fatal()
    result = fastattn.benchmark(
        model, reference=reference, workloads=Workload(2, 8), contenders=["fastattn"], dtypes="fp32",
        budget_s=0.1, isolate=True,
    )  # fmt: skip
    (measurement,) = result.measurements
    row = measurement.row("fastattn fp32")
    assert row.status == "failed" and "died of SIGABRT" in row.reason
    assert measurement.row("SDPA fp32").status == measurement.row("eager fp32").status == "measured"
