"""The committed suite: what it names, and how a promise is judged."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastattn.bench import Measurement, Parity, Row

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def suite(load_benchmark: Any) -> ModuleType:
    return load_benchmark("suite")


def measurement(suite: ModuleType, **times_ms: float) -> Measurement:
    """Rows of steady times on the ragged batch; "SDPA fp32" is the baseline."""
    rows = [
        Row(
            name=name.replace("_", " "),
            dtype="fp32",
            status="measured",
            wall_ms=(time,) * 9,
            parity=Parity(1e-7, 1.0, 1e-4),
            baseline=name == "SDPA_fp32",
        )
        for name, time in times_ms.items()
    ]
    return Measurement(suite.RAGGED, tuple(rows), "eager fp32")


def judged(suite: ModuleType, measured: Measurement, *arguments: Any) -> dict[str, Any]:
    return suite.judge(suite.Promise(suite.RAGGED, *arguments), measured)


def test_promises_are_judged_by_value_and_by_lower_bound(suite: ModuleType) -> None:
    measured = measurement(suite, SDPA_fp32=10.0, fastattn_fp32=5.0)
    held = judged(suite, measured, "fastattn fp32", (), 2.0)
    assert held["holds"] and held["over"] == "SDPA fp32" and held["ratio"]["value"] == 2.0
    assert not judged(suite, measured, "fastattn fp32", (), 2.1)["holds"]
    assert judged(suite, measured, "fastattn fp32", ("SDPA fp32",), 0.97, "low")["holds"]


def test_a_promise_over_several_peers_is_over_the_fastest_that_was_measured(suite: ModuleType) -> None:
    measured = measurement(suite, SDPA_fp32=10.0, slow_peer=9.0, quick_peer=6.0, ours=5.0)
    verdict = judged(suite, measured, "ours", ("slow peer", "quick peer", "absent peer"), 1.3)
    assert verdict["over"] == "quick peer" and not verdict["holds"]
    assert verdict["ratio"]["value"] == pytest.approx(1.2)


def test_a_promise_about_what_was_not_measured_does_not_hold(suite: ModuleType) -> None:
    measured = measurement(suite, SDPA_fp32=10.0, ours=5.0)
    absent = judged(suite, measured, "ours", ("absent peer",), 0.1)
    assert not absent["holds"] and absent["reason"] == "needs absent peer measured"
    assert not judged(suite, measured, "theirs", (), 0.1)["holds"]
    with pytest.raises(ValueError, match="it must be value or low"):
        suite.Promise(suite.RAGGED, "ours", (), 1.0, "high")


def test_every_promise_is_about_a_workload_and_a_contender_of_its_suite(suite: ModuleType) -> None:
    from fastattn.bench.contenders import BUILDERS, label

    names = {
        label(key, precision)
        for key, builder in BUILDERS.items()
        for precision in builder.precisions or ("fp32", "bf16")
    }
    for name, each in suite.SUITES.items():
        if name == "minilm":  # one of its workloads needs data
            continue
        workloads = each.workloads()
        for promise in each.promises:
            assert promise.workload in workloads, promise
            assert {promise.contender, *promise.over} <= names, promise


def test_a_small_suite_is_measured_and_written(
    suite: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.bench import Workload

    workload = Workload(2, 16, 0.6)
    promise = suite.Promise(workload, "fastattn fp32", (), 100.0)
    small = suite.Suite("MiniLM, small", "minilm", lambda: [workload], (promise,))
    monkeypatch.setitem(suite.SUITES, "small", small)
    monkeypatch.setattr(suite, "CONTENDERS", ["fastattn"])
    assert suite.main(["--models", "small", "--budget", "0.1", "--output", str(tmp_path)]) == 1
    document = json.loads((tmp_path / "cpu-small.json").read_text(encoding="utf-8"))
    assert document["schema"] == "fastattn.suite/1" and "--models small" in document["command"]
    (run,) = document["runs"]
    assert run["result"]["schema"] == "fastattn.benchmark/2" and run["promises"][0]["holds"] is False
