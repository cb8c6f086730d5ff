"""The README's figures, docs/figures.md and the plots are the committed results', or it is noticed."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from fastattn.bench import BenchmarkResult, Measurement, Parity, Row, Workload, paired_ratio

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
RAGGED, DECODE = Workload(8, 128, 0.47), Workload(1, 128, task="decode", new_tokens=64)
COSTS_MS = {
    "eager fp32": 400.0,
    "SDPA fp32": 300.0,
    "fastattn fp32": 125.0,
    "fastattn ONNX int8": 50.0,
    "ONNX Runtime int8": 100.0,
    "SDPA bf16": 200.0,
}
ENVIRONMENT = {
    "cpu": {"model": "a CPU", "usable_cores": 2, "torch_threads": 2, "load_average": 0.1, "flags": []},
    "gpu": None,
    "packages": {"torch": "2.13.0", "transformers": "5.23.0", "onnxruntime": "1.31.0"},
    "date_utc": "2026-11-22 09:21",
}


@pytest.fixture(scope="module")
def figures(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("figures")


@pytest.fixture
def document() -> dict[str, Any]:
    """A suite of invented times, the same for two workloads."""
    rows = []
    for name, cost_ms in COSTS_MS.items():
        ratio = paired_ratio([300.0] * 9, [cost_ms] * 9, "SDPA fp32")
        rows.append(
            Row(
                name,
                name.rpartition(" ")[2],
                "measured",
                wall_ms=(cost_ms,) * 9,
                parity=Parity(2e-7, scale=1.0, tolerance=1e-4),
                ratio=None if name == "SDPA fp32" else ratio,
                baseline=name == "SDPA fp32",
                highlight=name.startswith("fastattn"),
            )
        )
    result = BenchmarkResult(
        model={"name": "BertModel", "parameters": 110_000_000},
        measurements=(Measurement(RAGGED, tuple(rows)), Measurement(DECODE, tuple(rows))),
        environment=ENVIRONMENT,
        settings={"device": "cpu"},
    )
    promise = {"workload": str(RAGGED), "contender": "fastattn fp32", "over": "SDPA fp32", "at_least": 9.0,
               "bound": "value", "ratio": None, "reason": "nobody knows", "holds": False}  # fmt: skip
    quality = {"figure": "mean cosine with fp32", "measured": 0.99081, "holds": True}
    run = {"title": "BERT-base, random weights", "result": result.to_dict()}
    return {
        "schema": "fastattn.suite/1",
        "name": "cpu-bert-base",
        "command": "python benchmarks/suite.py --models bert-base",
        "environment": result.environment,
        "runs": [run | {"promises": [promise], "figures": [quality]}],
    }


@pytest.fixture
def tree(tmp_path: Path, document: dict[str, Any], figures: ModuleType) -> Path:
    """A checkout with one result and a README."""
    (tmp_path / "results").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "results" / "cpu.json").write_text(json.dumps(document), encoding="utf-8")
    text = f"# Title\n\n{figures.BEGIN}\nold 9.99x\n{figures.END}\n\nThe rest.\n"
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    return tmp_path


def run(figures: ModuleType, tree: Path, *options: str) -> int:
    return int(figures.main([*options, "--root", str(tree), "--results", str(tree / "results")]))


def test_all_is_written_then_up_to_date_and_each_change_is_named(
    figures: ModuleType, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, page, plots = tree / "README.md", tree / "docs" / "figures.md", tree / "docs" / "figures"
    assert run(figures, tree, "--check") == 1
    assert "9.99x" in readme.read_text(encoding="utf-8") and not plots.exists()
    assert "README.md disagrees" in (said := capsys.readouterr().err) and "figures.md is missing" in said
    assert run(figures, tree) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# Title\n\n") and text.endswith("\n\nThe rest.\n") and "9.99x" not in text
    assert (
        "| BERT-base: encode 8 x 128, 47% fill | 300 ms (SDPA fp32) "
        "| **2.40x** (2.40 to 2.40), error 2e-07 "
        "| fastattn ONNX int8 **6.00x** (6.00 to 6.00), error 2e-07 "
        "| ONNX Runtime int8 **3.00x** (3.00 to 3.00), error 2e-07 |"
    ) in text
    # The same values drawn again give the same bytes.
    assert run(figures, tree, "--check") == 0
    drawn = sorted(path.name for path in plots.iterdir())
    assert drawn == [
        f"{name}-{theme}.svg" for name in ("latency", "speed-ups") for theme in ("dark", "light")
    ]
    for linked in re.findall(r'(?:src|srcset)="([^"]+)"', text):
        assert (tree / linked).is_file()
    capsys.readouterr()
    readme.write_text(text.replace("2.40x", "4.20x"), encoding="utf-8")
    page.write_text(page.read_text(encoding="utf-8").replace("0.99081", "1.0"), encoding="utf-8")
    (plots / "old.svg").write_text("", encoding="utf-8")
    (plots / drawn[0]).write_text((plots / drawn[1]).read_text(encoding="utf-8"), encoding="utf-8")
    assert run(figures, tree, "--check") == 1
    said = capsys.readouterr().err
    for name in (
        "README.md disagrees",
        "figures.md disagrees",
        f"{drawn[0]} disagrees",
        "old.svg is left over",
    ):
        assert name in said
    assert drawn[1] not in said and "make figures" in said


def test_the_page_has_every_contender_what_was_promised_and_the_quality(
    figures: ModuleType, tree: Path, document: dict[str, Any]
) -> None:
    page = figures.figures_page(figures.load(tree / "results"), has_plots=True)
    for name in COSTS_MS:
        assert page.count(f"\n| {name} |") == 2
    assert "| fastattn fp32 | SDPA fp32 | 9.0x | nobody knows | **no** |" in page
    assert "| mean cosine with fp32 | 0.99081 | yes |" in page and document["command"] in page


def test_a_figure_without_parity_is_nowhere(
    figures: ModuleType, tree: Path, document: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for measurement in document["runs"][0]["result"]["measurements"]:
        row = measurement["rows"][2]
        row["parity"]["passed"] = False
        row["reason"] = "wrong | answer"
    (tree / "results" / "cpu.json").write_text(json.dumps(document), encoding="utf-8")
    documents = figures.load(tree / "results")
    text = figures.readme_block(documents, True) + figures.figures_page(documents, True)
    assert "2.40x" not in text and "wrong \\| answer" in text
    shown: list[Any] = []
    monkeypatch.setattr(figures, "draw_speed_ups", lambda candles, theme: shown.extend(candles))
    monkeypatch.setattr(figures, "draw_latency", lambda panels, theme: shown.extend(panels))
    figures.plots(documents)
    assert shown and "2.4" not in str(shown) and "fastattn fp32'" not in str(shown[-1])


def test_runs_over_families_are_a_line_each(
    figures: ModuleType, tree: Path, document: dict[str, Any]
) -> None:
    rows = document["runs"][0]["result"]["measurements"][0]["rows"][1:3]
    families = {
        "schema": "fastattn.families/1",
        "name": "cpu-families",
        "command": "python benchmarks/families.py --name cpu-families",
        "environment": document["environment"],
        "results": [{"run": "T5-small encode", "rows": rows}],
    }
    (tree / "results" / "a-families.json").write_text(json.dumps(families), encoding="utf-8")
    documents = figures.load(tree / "results")
    line = "| T5-small encode | SDPA fp32 | fastattn fp32 | 125 ms | **2.40x** (2.40 to 2.40), error 2e-07 |"
    assert line in figures.figures_page(documents, True)
    # The suite comes first, whatever the files are called, and the README only says that there is more.
    assert documents[0]["schema"] == "fastattn.suite/1"
    assert "1 more runs" in figures.readme_block(documents, True)


def test_a_plot_is_one_file_that_says_nothing_of_when_and_asks_for_no_font(
    figures: ModuleType, tree: Path
) -> None:
    for name, svg in figures.plots(figures.load(tree / "results")).items():
        root = ElementTree.fromstring(svg)
        tags = {element.tag.rpartition("}")[2] for element in root.iter()}
        assert "path" in tags and not tags & {"text", "image", "script"}, name
        assert "<dc:date>" not in svg and figures.drawn_by(svg) == figures.drawn_here()


@pytest.mark.parametrize("text", ["nothing", "{end} {begin}", "{begin} {end} {begin}"])
def test_missing_or_doubled_markers_are_an_error(figures: ModuleType, text: str) -> None:
    with pytest.raises(figures.StaleError, match="once each"):
        figures.renewed(text.format(begin=figures.BEGIN, end=figures.END), "block")


def pinned_matplotlib() -> str:
    constraints = (ROOT / "constraints" / "test.txt").read_text(encoding="utf-8")
    return re.findall(r"^matplotlib==(.+)$", constraints, flags=re.MULTILINE)[0]


@pytest.mark.skipif(
    importlib.metadata.version("matplotlib") != pinned_matplotlib(),
    reason="another matplotlib than the pinned one draws the plots in other bytes",
)
def test_this_repository_agrees_with_its_results(figures: ModuleType, capsys: Any) -> None:
    assert figures.main(["--check"]) == 0, capsys.readouterr().err
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition(figures.BEGIN)[2].partition(figures.END)[0]
    assert len(block.splitlines()) <= 46, "the README's table is for reading: docs/figures.md has all of it"


def test_without_results_no_plot_is_asked_for(figures: ModuleType, tree: Path) -> None:
    shutil.rmtree(tree / "results")
    (tree / "results").mkdir()
    assert run(figures, tree) == 0
    assert "<img" not in (tree / "README.md").read_text(encoding="utf-8")


def test_compressed_models_are_listed_with_what_was_promised(figures: ModuleType, tmp_path: Path) -> None:
    point = {
        "name": "untouched", "status": "measured", "reason": "", "score": 87.7, "model_bytes": 90_864_136,
        "latency_ms": 300.0, "speed_up": 1.0, "speed_up_low": None, "speed_up_high": None, "pareto": False,
    }  # fmt: skip
    points = [
        point,
        point
        | {"name": "int8", "speed_up": 3.5, "speed_up_low": 3.25, "speed_up_high": 3.75, "pareto": True},
        point | {"name": "int4", "speed_up": 0.5},
        point | {"name": "half", "status": "failed", "reason": "it broke", "score": None, "speed_up": None},
    ]
    promised = {"figure": "points lost", "promised": "<= 0.5", "measured": 0.75, "holds": False}
    sweep = {
        "model": "Bert", "metric": "accuracy", "higher_is_better": True, "workload": "4 batches",
        "points": points, "environment": ENVIRONMENT,
    }  # fmt: skip
    document = {
        "schema": "fastattn.quality/1", "name": "sst2", "command": "python it.py", "promises": [promised],
        "sweep": sweep,
    }  # fmt: skip
    (tmp_path / "quality-sst2.json").write_text(json.dumps(document))
    documents = figures.load(tmp_path)
    page, block = figures.figures_page(documents, False), figures.readme_block(documents, False)
    assert "| int8 | 87.7 | 90.9 | 300 | **3.50x** (3.25 to 3.75) |" in page and "python it.py" in page
    assert "| half | failed: it broke |" in page and "| points lost | &lt;= 0.5 | 0.75 | **no** |" in page
    assert "| sst2 (accuracy) | 87.7, 90.9 MB, **1.00x** | int8: 87.7, 90.9 MB, **3.50x** |" in block
    assert "int4" not in block
