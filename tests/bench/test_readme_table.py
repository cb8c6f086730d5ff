"""The README's figures are the committed results', and promises that are not kept are noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fastattn.bench import BenchmarkResult, Contender, Measurement, Parity, capture_environment, measure

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def table(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("readme_table")


@pytest.fixture(scope="module")
def encoders(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    pytest.importorskip("transformers")
    return load_benchmark("encoders")


@pytest.fixture
def measured(new_timer: Callable[[], Any], encoders: ModuleType) -> BenchmarkResult:
    """Invented times, the same for two workloads."""
    timer = new_timer()

    def check(contender: Contender, output: Any) -> Parity:
        return Parity(2e-7, scale=1.0, tolerance=1e-4)

    costs_s = {
        "eager fp32": 0.4,
        "SDPA fp32": 0.3,
        "fastattn fp32": 0.125,
        "fastattn ONNX fp32": 0.15,
        "transformers ONNX fp32": 0.3,
        "SDPA bf16": 0.2,
        "fastattn bf16": 0.08,
    }
    contenders = [timer.contender(name, cost) for name, cost in costs_s.items()]
    rows = measure(contenders, check=check, baseline=["eager fp32", "SDPA fp32"], budget_s=0, timer=timer)
    return BenchmarkResult(
        model={"name": "BertModel", "parameters": 110_000_000},
        measurements=(Measurement(encoders.RAGGED, tuple(rows)), Measurement(encoders.FULL, tuple(rows))),
        environment=capture_environment(),
        settings={"device": "cpu"},
    )


@pytest.fixture
def results(measured: BenchmarkResult, table: ModuleType, tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    document = {
        "schema": table.SCHEMA,
        "command": "python benchmarks/encoders.py --name cpu",
        "models": [{"title": "BERT-base", "result": measured.to_dict()}],
        "promises": [],
    }
    (folder / "cpu.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def run(table: ModuleType, readme: Path, results: Path, *options: str) -> int:
    return int(table.main([*options, "--readme", str(readme), "--results", str(results)]))


def test_the_block_is_written_between_its_markers_and_then_up_to_date(
    table: ModuleType, results: Path, tmp_path: Path
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{table.BEGIN}\nold 9.99x\n{table.END}\n\nThe rest.\n", encoding="utf-8")
    assert run(table, readme, results, "--check") == 1
    assert "9.99x" in readme.read_text(encoding="utf-8")
    assert run(table, readme, results) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe rest.\n") and "9.99x" not in text
    assert (
        "| 8 x 128, 47% fill | 300 ms (SDPA fp32) | 125 ms, **2.40x** (2.40 to 2.40), error 2e-07 |" in text
    )
    assert run(table, readme, results, "--check") == 0
    readme.write_text(text.replace("2.40x", "4.20x"), encoding="utf-8")
    assert run(table, readme, results, "--check") == 1


@pytest.mark.parametrize("text", ["nothing", "{end} {begin}", "{begin} {end} {begin}"])
def test_missing_or_doubled_markers_are_an_error(
    table: ModuleType, results: Path, tmp_path: Path, text: str
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(text.format(begin=table.BEGIN, end=table.END), encoding="utf-8")
    with pytest.raises(table.StaleError, match="once each"):
        run(table, readme, results)


def test_a_figure_without_parity_is_not_written(table: ModuleType, results: Path, tmp_path: Path) -> None:
    file = results / "cpu.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for measurement in document["models"][0]["result"]["measurements"]:
        for row in measurement["rows"]:
            if row["name"] == "fastattn fp32":
                row["parity"]["passed"] = False
                row["reason"] = "wrong answer"
    file.write_text(json.dumps(document), encoding="utf-8")
    text = table.block(table.load(results))
    assert "2.40x" not in text and "wrong answer" in text


def test_promises_are_judged_by_value_and_by_lower_bound(
    encoders: ModuleType, measured: BenchmarkResult
) -> None:
    verdicts = {(each["workload"], each["contender"]): each for each in encoders.judgements(measured)}
    ragged, full = str(encoders.RAGGED), str(encoders.FULL)
    fp32 = verdicts[ragged, "fastattn fp32"]
    assert fp32["holds"] and fp32["over"] == "SDPA fp32" and fp32["ratio"]["value"] == pytest.approx(2.4)
    bf16 = verdicts[ragged, "fastattn bf16"]
    assert bf16["holds"] and bf16["over"] == "eager fp32" and bf16["ratio"]["value"] == pytest.approx(5.0)
    export = verdicts[ragged, "fastattn ONNX fp32"]
    assert export["holds"] and export["ratio"]["value"] == pytest.approx(2.0)
    assert verdicts[full, "fastattn bf16"]["over"] == "SDPA bf16"
    assert "yes" in encoders.verdicts_table(list(verdicts.values()))


def test_a_promise_about_what_was_not_measured_does_not_hold(
    encoders: ModuleType, measured: BenchmarkResult
) -> None:
    rows = [row for row in measured.measurements[0].rows if row.name != "transformers ONNX fp32"]
    verdict = encoders.judge(encoders.PROMISES[2], Measurement(encoders.RAGGED, tuple(rows)))
    assert not verdict["holds"] and verdict["reason"] == "needs transformers ONNX fp32 measured"
    assert "NO" in encoders.verdicts_table([verdict])


@pytest.mark.skipif(
    not list((ROOT / "benchmarks" / "results").glob("*.json")), reason="no results are committed"
)
def test_the_readme_agrees_with_the_committed_results(table: ModuleType) -> None:
    assert table.main(["--check"]) == 0, "run python benchmarks/readme_table.py"
