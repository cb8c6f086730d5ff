"""docs/quantized-linears.md says what was measured: generated, and bold just where it is faster."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def quantized_linears():
    path = ROOT / "benchmarks" / "quantized_linears.py"
    spec = importlib.util.spec_from_file_location("quantized_linears", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_results_say(quantized_linears):
    assert quantized_linears.main(["--page", "--check"]) == 0


def test_every_contender_computes_the_same(quantized_linears):
    made, check = quantized_linears.contenders(3, 128, 64, copies=2)
    assert {each.name.split(" ")[0] for each in made} == {
        "fp32",
        "bf16",
        "int8",
        "int8-weight",
        "int4-weight",
    }
    for contender in made:
        for _ in range(3):
            parity = check(contender, contender.run())
            assert parity.passed, f"{contender.name}: {parity}"


def test_only_what_is_faster_either_way_is_recommended(quantized_linears, tmp_path):
    def ratio(value):
        return {"value": value, "low": value - 0.1, "high": value + 0.1}

    assert quantized_linears._cell([ratio(2.0), ratio(1.3)]) == "**2 / 1.3**"
    assert quantized_linears._cell([ratio(2.0), ratio(1.05)]) == "2 / 1.1"
    assert quantized_linears._cell([ratio(2.0), None]) == "not measured"
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"schema": "fastattn.models/1"}))
    with pytest.raises(quantized_linears.StaleError, match=r"other\.json"):
        quantized_linears.main(["--page", "--results", str(other)])
