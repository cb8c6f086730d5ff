"""docs/models.md is what the registry and the recorded test results say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

pytestmark = pytest.mark.model

ROOT = Path(__file__).parents[2]
JUNIT = """<testsuites><testsuite name="pytest">
<properties><property name="transformers" value="5.{minor}.0"/>
<property name="torch" value="2.13.0"/></properties>
{tests}</testsuite></testsuites>"""
TEST = """<testcase name="{name}[{case}]"><properties><property name="case" value="{case}"/>
<property name="family" value="{family}"/></properties>{outcome}</testcase>"""


@pytest.fixture(scope="module")
def models_page():
    spec = importlib.util.spec_from_file_location("models_page", ROOT / "benchmarks" / "models_page.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def junit(folder, minor, *tests):
    text = "".join(
        TEST.format(name=name, case=case, family=case.lower(), outcome=out) for name, case, out in tests
    )
    path = folder / f"{minor}.xml"
    path.write_text(JUNIT.format(minor=minor, tests=text), encoding="utf-8")
    return path


def test_the_page_is_current(models_page, capsys):
    assert models_page.main(["--check"]) == 0, capsys.readouterr().err


def test_every_family_of_the_tests_is_recorded(models_page):
    """A case that was added is in the tables once `make models` has run."""
    from family_cases import CASES

    for version, found in models_page.load(models_page.RESULTS)["transformers"].items():
        assert {case.name for case in CASES} == set(found["cases"]), version
        failed = {
            f"{case} {name}"
            for case, entry in found["cases"].items()
            for name, result in entry["tests"].items()
            if result["outcome"] == models_page.FAILED
        }
        assert not failed, version


def test_a_junit_file_becomes_rows(models_page, tmp_path):
    failure = '<failure message="AssertionError: error 1e-2&#10;more"/>'
    passed, skipped = "", '<skipped type="pytest.skip" message="does not generate"/>'
    expected = '<skipped type="pytest.xfail" message="reason: no adapter"/>'
    older = junit(
        tmp_path,
        17,
        ("test_forward", "Bert", failure),
        ("test_generation", "Bert", skipped),
        ("test_compile", "Bert", expected),
        ("test_half_precision", "Bert", skipped),
        ("test_half_precision", "Bert", passed),
    )
    newer = junit(tmp_path, 23, ("test_forward", "Bert", passed), ("test_generation", "Bert", skipped))
    results = tmp_path / "models.json"
    models_page.record([newer], results)
    models_page.record([older], results)
    document = json.loads(results.read_text())
    assert list(document["transformers"]) == ["5.17.0", "5.23.0"]
    site = SimpleNamespace(kind="residual_norm")
    family = SimpleNamespace(
        name="bert", attention="absolute | positions", sites=(site,), limits=("Its loss.",)
    )
    text = models_page.block({"bert": family}, document)
    assert "| Bert | absolute / positions | residual + norm |" in text
    row = next(line for line in text.splitlines() if line.startswith("| Bert | fails"))
    assert (
        row.startswith("| Bert | fails in 5.17.0 | yes | ") and "not yet in 5.17.0" in row and "- (1)" in row
    )
    assert "1. does not generate" in text and "- bert: Its loss." in text


def test_a_page_without_markers_and_a_foreign_file_are_refused(models_page, tmp_path):
    with pytest.raises(models_page.StaleError, match="once each"):
        models_page.renewed("# Models", {}, models_page.load(tmp_path / "none.json"))
    path = tmp_path / "other.xml"
    path.write_text("<testsuites><testsuite/></testsuites>", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no results of tests/models/test_families\.py"):
        models_page.read_junit(path)
