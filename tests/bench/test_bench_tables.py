"""CSV and Markdown hold what was measured, and stay readable by programs whatever the names hold."""

from __future__ import annotations

import csv
import io
import re
from typing import Any

import pytest

from fastattn.bench import Parity, Row, Workload, paired_ratio
from fastattn.bench.saved import SUITE, measured
from fastattn.bench.tables import COLUMNS, csv_text, markdown_text

HOSTILE = 'failed: a | b\nsecond line, "quoted"; <b>'


def result() -> dict[str, Any]:
    """One workload: a baseline, a decoder with parts, one that failed and one that is missing."""
    parity = Parity(2e-6, scale=2.0, tolerance=1e-4)
    slow, fast = tuple(20.0 + i for i in range(8)), tuple(10.0 + i / 2 for i in range(8))
    rows = [
        Row("SDPA fp32", "fp32", "measured", wall_ms=slow, cpu_ms=slow, parity=parity, baseline=True),
        Row(
            "fastattn fp32",
            "fp32",
            "measured",
            wall_ms=fast,
            cpu_ms=fast,
            first_call_ms=99.0,
            parity=parity,
            ratio=paired_ratio(slow, fast, "SDPA fp32"),
            stages_ms={"export": 40.0, "load": 2.5},
            parts_ms={"inter_token_ms": (3.0, 1.0, 2.0), "other_ms": (7.0,)},
            peak_host_bytes=5 * 2**20,
            energy_j=0.25,
        ),
        Row("OpenVINO fp32", "fp32", "failed", HOSTILE),
        Row("CTranslate2 int8", "int8", "missing", "missing: pip install ctranslate2"),
    ]
    return {
        "schema": "fastattn.benchmark/2",
        "model": {"name": "GPT2|Model", "parameters": 124_000_000},
        "settings": {"device": "cpu"},
        "environment": {},
        "measurements": [
            {
                "workload": Workload(2, 64, 0.75, task="decode", new_tokens=8).to_dict(),
                "baseline": "SDPA fp32",
                "rows": [row.to_dict() for row in rows],
            }
        ],
    }


def test_csv_has_one_line_a_row_and_its_columns_in_order() -> None:
    lines = list(csv.reader(io.StringIO(csv_text(result()))))
    assert tuple(lines[0]) == COLUMNS and len(set(COLUMNS)) == len(COLUMNS)
    assert [len(line) for line in lines] == [len(COLUMNS)] * 5
    _, ours, failed, missing = csv.DictReader(io.StringIO(csv_text(result())))
    assert (ours["task"], ours["batch"], ours["fill"], ours["new_tokens"]) == ("decode", "2", "0.75", "8")
    assert float(ours["min_ms"]) == 10 and float(ours["p50_ms"]) == 11.75 and float(ours["p99_ms"]) == 13.5
    assert float(ours["ratio"]) == 2 and ours["baseline"] == "SDPA fp32" and float(ours["error"]) == 1e-6
    assert (ours["stages_ms"], ours["stages"]) == ("42.5", "export=40; load=2.5")
    assert float(ours["inter_token_p50_ms"]) == 2 and float(ours["inter_token_p99_ms"]) == 3
    assert ours["other_parts"] == "other_p50=7" and ours["peak_host_bytes"] == str(5 * 2**20)
    assert failed["reason"] == HOSTILE and failed["min_ms"] == failed["ratio"] == failed["error"] == ""
    assert (missing["status"], missing["precision"], missing["rounds"]) == ("missing", "int8", "0")


def test_markdown_has_a_table_a_workload_that_no_name_breaks() -> None:
    text = markdown_text(result())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    # A bar that is not escaped would make another column.
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1 and len(rows) == 2 + 4
    assert "<b>" not in text and "a \\| b second line" in text
    assert "### GPT2\\|Model, 124.0M parameters: decode 2 x 64, 75% fill, 8 new tokens" in text
    assert "2.00x (2.00 to 2.00)" in rows[3] and "inter token ms" in rows[0]
    # No row was measured on a GPU.
    assert "device MiB" not in rows[0]


def test_a_ratio_whose_parity_failed_is_not_in_the_markdown() -> None:
    document = result()
    document["measurements"][0]["rows"][1]["parity"]["passed"] = False
    assert "2.00x" not in markdown_text(document)


def test_a_suite_holds_all_its_runs_and_another_schema_is_refused() -> None:
    suite = {"schema": SUITE, "runs": [{"title": name, "result": result()} for name in ("one", "two")]}
    assert [each.model for each in measured(suite)] == ["one", "two"]
    assert csv_text(suite).count("fastattn fp32") == 2
    with pytest.raises(ValueError, match=r"schema is 'other/9'; it must be one of fastattn.benchmark/1"):
        csv_text({"schema": "other/9"})
    with pytest.raises(ValueError, match=r"'fastattn.suite/1' lacks 'runs'"):
        markdown_text({"schema": SUITE})


def test_the_first_schema_is_read_as_encoding() -> None:
    document = result() | {"schema": "fastattn.benchmark/1"}
    workload = document["measurements"][0]["workload"]
    del workload["task"], workload["new_tokens"]
    for row in document["measurements"][0]["rows"]:
        for name in ("stages_ms", "parts_ms", "peak_host_bytes", "peak_device_bytes", "energy_j"):
            del row[name]
    (line, *_) = csv.DictReader(io.StringIO(csv_text(document)))
    assert line["task"] == "encode" and line["workload"] == "encode 2 x 64, 75% fill"
