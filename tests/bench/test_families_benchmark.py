"""The benchmark of all families: what is timed, and what is judged."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def families(load_benchmark: Any) -> ModuleType:
    return load_benchmark("families")


def result(name: str, value: float, low: float, baseline: bool = True) -> dict[str, Any]:
    ratio = {"value": value, "low": low, "high": value + 0.1, "baseline": "SDPA fp32", "rounds": 9}
    parity = {"passed": True, "relative_error": 2e-7}
    times = {"min_ms": 9.0, "median_ms": 10.0, "reason": ""}
    return {
        "run": name,
        "rows": [
            {**times, "name": "SDPA fp32", "baseline": baseline, "ratio": None, "parity": parity},
            {**times, "name": "fastattn fp32", "baseline": False, "ratio": ratio, "parity": parity},
        ],
    }


def test_promises_are_judged_by_value_by_bound_and_beside_bert(families: ModuleType) -> None:
    results = [
        result("BERT-base encode", 2.0, 1.9),
        result("RoBERTa-base encode", 1.91, 1.5),
        result("ELECTRA-base encode", 1.89, 1.5),
        result("T5-small encode", 1.2, 0.96),
        result("Marian encode", 0.99, 0.97),
    ]
    found = {each["run"]: each for each in families.verdicts(results)}
    assert [each["holds"] for each in found.values()] == [True, True, False, False, True]
    assert found["RoBERTa-base encode"]["at_least"] == pytest.approx(1.9)
    text = families.table(results, list(found.values()))
    assert "1.89x (1.50 to 1.99)" in text and text.count("NO") == 2


def test_like_bert_is_not_judged_without_bert(families: ModuleType) -> None:
    (verdict,) = families.verdicts([result("RoBERTa-base encode", 9.0, 8.0)])
    assert not verdict["holds"] and "needs BERT-base encode" in families.table(
        [result("RoBERTa-base encode", 9.0, 8.0)], [verdict]
    )


def test_every_run_is_named_once_and_a_small_one_is_measured(
    families: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [run.name for run in families.RUNS]
    assert len(set(names)) == len(names)
    workload = families.Workload(3, 9, 0.5)
    runs = [
        families.Run(
            "torch", lambda: families.torch_encoder(16, 2, 2), lambda m: families.encode_vectors(m, workload)
        ),
        families.Run(
            "t5",
            lambda: families.build(
                "T5ForConditionalGeneration",
                "T5Config",
                d_model=16,
                d_kv=8,
                num_heads=2,
                d_ff=24,
                num_layers=1,
                vocab_size=40,
            ),
            families.decode_step_after_encoder,
        ),
        families.Run(
            "llama",
            lambda: families.build(
                "LlamaForCausalLM",
                "LlamaConfig",
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=24,
                vocab_size=40,
            ),
            families.decode_step,
        ),
    ]
    for run, baselines in zip(runs, (1, 2, 2), strict=True):
        rows = families.measured(run, budget_s=0.01)["rows"]
        assert len(rows) == baselines + 1 and [row["status"] for row in rows] == ["measured"] * len(rows)
        assert rows[-1]["ratio"]["rounds"] >= 9 and sum(row["baseline"] for row in rows) == 1
