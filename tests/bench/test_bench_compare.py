"""Two runs compared: what became slower is found, what only the machine made slower is not."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastattn.bench import Parity, Row, Workload, paired_ratio
from fastattn.bench.comparison import Comparison, compare_runs
from fastattn.bench.ratio import MINIMUM_ROUNDS
from fastattn.bench.runs import Quantity, read_run
from fastattn.cli import main

ROUNDS = 25
ENVIRONMENT = {
    "cpu": {"model": "a CPU", "usable_cores": 2, "torch_threads": 2},
    "gpu": None,
    "os": "Linux",
    "python": "3.11",
    "packages": {"torch": "2.13.0"},
}
COSTS = {"eager fp32": 30.0, "SDPA fp32": 20.0, "fastattn fp32": 10.0, "fastattn bf16": 5.0}


def result(seed: int, drift: float = 1.0, **factors: float) -> dict[str, Any]:
    """A run whose rounds are noisy together by a third and each by 2%; `factors` makes rows slower."""
    rng = random.Random(seed)
    rounds = [drift * rng.uniform(1.0, 1.35) for _ in range(ROUNDS)]
    rows = []
    for name, cost in COSTS.items():
        cost *= factors.get(name.replace(" ", "_"), 1.0)
        wall = tuple(cost * each * rng.gauss(1, 0.02) for each in rounds)
        rows.append(
            Row(name, "fp32", "measured", wall_ms=wall, parity=Parity(1e-6, scale=1.0, tolerance=1e-4))
        )
    base = rows[1]
    plain = []
    for row in rows:
        ratio = None if row is base else paired_ratio(base.wall_ms, row.wall_ms, base.name)
        plain.append(row.to_dict() | {"ratio": ratio and ratio.to_dict(), "baseline": row is base})
    workload = Workload(8, 128, 0.47).to_dict()
    return {
        "schema": "fastattn.benchmark/2",
        "model": {"name": "BertModel", "parameters": 1_000_000},
        "settings": {"device": "cpu"},
        "environment": copy.deepcopy(ENVIRONMENT),
        "warnings": [],
        "measurements": [{"workload": workload, "baseline": base.name, "rows": plain}],
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], str]:
    def write(name: str, document: Any) -> str:
        path = tmp_path / name
        path.write_text(json.dumps(document), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def compare(write: Callable[[str, Any], str]) -> Callable[..., Comparison]:
    def compare(old: Any, new: Any, *options: Any) -> Comparison:
        return compare_runs(read_run(write("old.json", old)), read_run(write("new.json", new)), *options)

    return compare


def verdicts(comparison: Comparison) -> dict[str, str]:
    return {row.contender: row.verdict for row in comparison.rows}


def test_a_row_that_became_slower_fails_on_a_machine_that_is_slower_today(compare: Any) -> None:
    found = compare(result(1), result(2, drift=1.5, fastattn_bf16=1.15))
    assert verdicts(found) == {
        "eager fp32": "same",
        "SDPA fp32": "baseline",
        "fastattn fp32": "same",
        "fastattn bf16": "slower",
    }
    (row,) = found.failed
    assert row.metric == "speed-up" and row.speed_up.change == pytest.approx(1 / 1.15 - 1, abs=0.03)
    assert row.time.change == pytest.approx(1.5 * 1.15 - 1, abs=0.2)


def test_by_time_the_slower_machine_fails_every_row(compare: Any) -> None:
    assert set(verdicts(compare(result(1), result(2, drift=1.5), 0.05, "time")).values()) == {"slower"}


def test_a_faster_row_is_said_to_be_faster(compare: Any) -> None:
    assert verdicts(compare(result(1), result(2, fastattn_fp32=0.7)))["fastattn fp32"] == "faster"


def test_the_same_thing_measured_twice_seldom_fails(compare: Any) -> None:
    failed = sum(bool(compare(result(seed), result(seed + 1000), 0.0).failed) for seed in range(20))
    # Each of three judged rows is beyond its 95% interval on the slower side in one of forty runs.
    assert failed <= 4


def test_the_interval_holds_the_true_change(compare: Any) -> None:
    held = 0
    for seed in range(40):
        row = compare(result(seed), result(seed + 1000, fastattn_fp32=1.1)).rows[2]
        held += row.speed_up.low <= 1 / 1.1 - 1 <= row.speed_up.high
    assert held >= 34


def test_the_speed_up_is_over_the_old_baseline_though_another_is_faster_now(compare: Any) -> None:
    new = result(2, eager_fp32=0.5)
    new["measurements"][0]["baseline"] = "eager fp32"
    found = compare(result(1), new)
    assert verdicts(found)["fastattn fp32"] == "same" and verdicts(found)["eager fp32"] == "faster"


def test_what_was_right_and_is_wrong_fails_and_what_is_missing_is_listed(compare: Any) -> None:
    old, new = result(1), result(2)
    rows = new["measurements"][0]["rows"]
    rows[2] |= {"status": "wrong", "reason": "wrong answer: largest error 0.5", "wall_ms": [], "ratio": None}
    rows[3] |= {"status": "missing", "reason": "missing: bf16", "wall_ms": [], "ratio": None}
    rows.append({**rows[0], "name": "OpenVINO fp32"})
    old["measurements"][0]["rows"].append({**rows[0], "name": "Liger fp32"})
    found = compare(old, new)
    assert verdicts(found) == {
        "eager fp32": "same",
        "SDPA fp32": "baseline",
        "fastattn fp32": "broken",
        "fastattn bf16": "not measured",
        "Liger fp32": "only old",
        "OpenVINO fp32": "only new",
    }
    assert [row.contender for row in found.failed] == ["fastattn fp32"]
    assert "BROKEN: wrong answer" in found.text() and "missing: bf16" in found.markdown()
    assert verdicts(compare(new, old))["fastattn fp32"] == "mended"


def test_too_few_rounds_cannot_fail(compare: Any) -> None:
    old, new = result(1), result(2, fastattn_fp32=3.0)
    for document in (old, new):
        for row in document["measurements"][0]["rows"]:
            row["wall_ms"] = row["wall_ms"][: MINIMUM_ROUNDS - 1]
    found = compare(old, new)
    assert verdicts(found)["fastattn fp32"] == "unsure" and f"{MINIMUM_ROUNDS} rounds" in found.text()


def test_a_ratio_without_parity_is_not_used(compare: Any) -> None:
    old, new = result(1), result(2)
    for row in new["measurements"][0]["rows"]:
        row["parity"] = row["ratio"] = None
    assert {row.metric for row in compare(old, new).rows} == {"time"}


def test_other_machines_and_versions_are_named(compare: Any) -> None:
    new = result(2)
    new["environment"]["cpu"]["torch_threads"] = 8
    new["environment"]["packages"]["torch"] = "2.14.0"
    new["environment"]["gpu"] = {"name": "H100"}
    new["warnings"] = ["The machine was busy: load 3.0."]
    first, second = compare(result(1), new).warnings
    for text in ("threads 2 against 8", "torch 2.13.0 against 2.14.0", "GPU none against H100"):
        assert text in first
    assert "processor" not in first and second == "New run: The machine was busy: load 3.0."
    assert compare(result(1), result(2)).warnings == ()


def test_suites_are_matched_run_by_run(compare: Any) -> None:
    def suite(**results: dict[str, Any]) -> dict[str, Any]:
        runs = [{"title": title, "result": each} for title, each in results.items()]
        return {"schema": "fastattn.suite/1", "environment": ENVIRONMENT, "runs": runs}

    found = compare(suite(a=result(1), b=result(2)), suite(b=result(3, fastattn_fp32=2.0), a=result(4)))
    assert [(row.model, row.contender) for row in found.failed] == [("b", "fastattn fp32")]


def test_runs_with_nothing_in_common_are_an_error_not_a_pass(compare: Any) -> None:
    other = result(2)
    other["model"]["name"] = "GPT2Model"
    with pytest.raises(ValueError, match=r"no row is in both runs: .*BertModel.*GPT2Model"):
        compare(result(1), other)


def test_draws_of_a_median_are_those_of_resampling() -> None:
    import numpy as np

    samples = tuple(random.Random(0).lognormvariate(0, 0.3) for _ in range(21))
    draws = Quantity(1.0, samples).draws(20_000, seed=0)
    picks = np.random.default_rng(1).integers(0, 21, size=(20_000, 21))
    expected = np.median(np.asarray(samples)[picks], axis=1)
    assert draws is not None
    for level in (0.025, 0.25, 0.5, 0.75, 0.975):
        assert np.quantile(draws, level) == pytest.approx(np.quantile(expected, level), rel=0.03)


# pytest-benchmark's own files.

SUITE = """
import time
import pytest

@pytest.mark.parametrize("contender", ["reference", "fastattn"])
def test_op(benchmark, contender):
    benchmark.group = "op"
    if contender == "fastattn":
        benchmark.extra_info["ratio"] = {"value": 2.0, "low": 1.95, "high": 2.05, "baseline": "reference"}
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=8)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What pytest-benchmark writes: every sample with --benchmark-json, statistics with --benchmark-save."""
    folder = tmp_path_factory.mktemp("pytest-benchmark")
    (folder / "test_suite.py").write_text(SUITE, encoding="utf-8")
    (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    options = ["--benchmark-json=full.json", "--benchmark-save=x", "--benchmark-storage=file://saved"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = (folder / "saved").rglob("*.json")
    found = {"samples": folder / "full.json", "statistics": saved}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in found.items()}


def slower(document: dict[str, Any], factor: float) -> dict[str, Any]:
    """The same file with every time of the fastattn row multiplied."""
    document = copy.deepcopy(document)
    stats = document["benchmarks"][1]["stats"]
    for name in ("min", "max", "mean", "stddev", "median", "iqr", "q1", "q3"):
        stats[name] *= factor
    stats["data"] = [factor * each for each in stats.get("data", [])]
    return document


@pytest.mark.parametrize("kind", ["samples", "statistics"])
def test_pytest_benchmark_files_are_compared(compare: Any, files: Any, kind: str) -> None:
    found = compare(files[kind], slower(files[kind], 30.0), 0.05, "time")
    assert [row.contender for row in found.failed] == ["test_op[fastattn]"]
    assert found.rows[1].time.change == pytest.approx(29.0) and found.rows[1].old_ms > 1.0
    assert found.rows[0].model == "test_suite.py"
    # Its ratio, measured in turns, did not change: the machine did.
    assert verdicts(compare(files[kind], slower(files[kind], 2.0))) == {
        "test_op[reference]": "baseline",
        "test_op[fastattn]": "same",
    }
    changed = copy.deepcopy(files[kind])
    changed["benchmarks"][1]["extra_info"]["ratio"] |= {"value": 1.5, "low": 1.47, "high": 1.53}
    assert verdicts(compare(files[kind], changed))["test_op[fastattn]"] == "slower"


def test_ours_and_pytest_benchmarks_do_not_match(compare: Any, files: Any) -> None:
    with pytest.raises(ValueError, match=r"fastattn's and the new one pytest-benchmark's"):
        compare(result(1), files["samples"])


# The command.


def run(*arguments: str) -> int:
    return main(["bench", "--compare", *arguments])


def test_the_exit_status_says_whether_a_row_failed(write: Any, capsys: Any) -> None:
    old, same = write("a.json", result(1)), write("b.json", result(2))
    bad = write("c.json", result(3, fastattn_fp32=1.3))
    assert run(old, same) == 0 and "1 baseline" in capsys.readouterr().out
    assert run(old, bad, "--fail-over", "5%") == 1 and "SLOWER" in capsys.readouterr().out
    assert run(old, bad, "--fail-over", "0.5") == 0
    assert run(old, bad, "--fail-over", "50%", "--metric", "time") == 0


def test_json_is_printed_and_markdown_is_written(write: Any, capsys: Any, tmp_path: Path) -> None:
    old, bad = write("a.json", result(1)), write("b.json", result(2, fastattn_fp32=1.3))
    assert run(old, bad, "--json", "--markdown", str(tmp_path / "c.md")) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "fastattn.comparison/1" and printed["failed"] == 1
    assert [row["contender"] for row in printed["rows"] if row["failed"]] == ["fastattn fp32"]
    assert "| fastattn fp32 |" in (tmp_path / "c.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("text", ["5", "-1%", "much", "nan", "inf%", "1"])
def test_a_threshold_that_could_mean_two_things_is_refused(write: Any, capsys: Any, text: str) -> None:
    path = write("a.json", result(1))
    assert run(path, path, f"--fail-over={text}") == 2
    assert f"--fail-over is {text!r}; it must be a percentage such as 5%" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(write: Any, capsys: Any, tmp_path: Path) -> None:
    good = write("a.json", result(1))
    (tmp_path / "broken.json").write_text("{", encoding="utf-8")
    cases = {
        str(tmp_path / "nowhere.json"): "nowhere.json",
        str(tmp_path / "broken.json"): "broken.json is not JSON",
        write("list.json", [1]): "it must hold an object",
        write("other.json", {"schema": "other/1"}): "schema is 'other/1'",
        write("lacks.json", {"schema": "fastattn.benchmark/2"}): "lacks 'model'",
    }
    for path, message in cases.items():
        assert run(good, path) == 2
        assert message in capsys.readouterr().err
    assert run(good, good, "--metric", "feeling") == 2
    assert "metric is 'feeling'; it must be one of auto, time, speed-up" in capsys.readouterr().err
    assert run(good, good, "--html", str(tmp_path / "x.html")) == 2
    assert run(good, good, "--markdown", str(tmp_path / "no" / "x.md")) == 2
