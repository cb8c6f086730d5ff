"""Writes docs/models.md from the registry and the results of tests/models/test_families.py: no cell is typed.

python benchmarks/models_page.py --record a.xml b.xml    # takes junit files of the tests into models.json
python benchmarks/models_page.py                         # renews the page
python benchmarks/models_page.py --check                 # exit status 1 where it is out of date

`make models` does all of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "models.md"
RESULTS = HERE / "results" / "models.json"
SCHEMA = "fastattn.models/1"
BEGIN, END = "<!-- models:begin -->", "<!-- models:end -->"

# What each column asks of the tests; a cell is the worst of them, over both versions of transformers.
COLUMNS: dict[str, tuple[str, ...]] = {
    "outputs": ("test_forward", "test_no_mask", "test_a_row_of_padding"),
    "half precision": ("test_half_precision", "test_autocast"),
    "padding left out": ("test_packing",),
    "packed sequences": ("test_packed_position_ids",),
    "generation": ("test_generation", "test_assisted_decoding"),
    "gradients": ("test_gradients", "test_gradient_checkpointing"),
    "LoRA": ("test_peft",),
    "compile": ("test_compile",),
    "export": ("test_export",),
    "recorded outputs": ("test_recorded_outputs",),
    "hooks": ("test_hooks", "test_hooks_between_layers"),
    "restore, copies": ("test_restore", "test_copies"),
}
KINDS = {
    "residual_norm": "residual + norm",
    "norm": "norm",
    "activation": "MLP",
    "encoder": "encoder",
}

# Worst first.
FAILED, EXPECTED, PASSED, SKIPPED = "failed", "not yet", "passed", "skipped"


class StaleError(ValueError):
    """The page cannot hold the tables: its markers are missing or doubled."""


def read_junit(path: Path) -> tuple[str, dict[str, Any]]:
    """The transformers version a junit file is of, and each family's outcomes by test."""
    root = ElementTree.parse(path).getroot()
    suite = next(root.iter("testsuite"))
    about = _properties(suite)
    if "transformers" not in about:
        raise ValueError(f"{path} holds no results of tests/models/test_families.py")
    cases: dict[str, Any] = {}
    for test in suite.iter("testcase"):
        found = _properties(test)
        if "case" not in found:
            continue
        entry = cases.setdefault(found["case"], {"family": found["family"], "tests": {}})
        name = str(test.get("name")).partition("[")[0]
        outcome, reason = _outcome(test)
        before = entry["tests"].get(name)
        # Of several parametrizations one that ran outweighs one that had nothing to do.
        if before is None or _ORDER.index(outcome) < _ORDER.index(before["outcome"]):
            entry["tests"][name] = {"outcome": outcome, **({"reason": reason} if reason else {})}
    return about["transformers"], {"torch": about["torch"], "cases": cases}


_ORDER = (FAILED, EXPECTED, PASSED, SKIPPED)


def _properties(element: ElementTree.Element) -> dict[str, str]:
    found = element.find("properties")
    return {} if found is None else {str(each.get("name")): str(each.get("value")) for each in found}


def _outcome(test: ElementTree.Element) -> tuple[str, str]:
    for kind in ("failure", "error"):
        if (found := test.find(kind)) is not None:
            return FAILED, str(found.get("message")).splitlines()[0]
    skipped = test.find("skipped")
    if skipped is None:
        return PASSED, ""
    expected = skipped.get("type") == "pytest.xfail"
    return (EXPECTED if expected else SKIPPED), str(skipped.get("message")).removeprefix("reason: ")


def record(paths: Iterable[Path], results: Path) -> None:
    """Take junit files into the results; a version replaces what it had."""
    document = load(results)
    for path in paths:
        version, found = read_junit(path)
        document["transformers"][version] = found
    document["transformers"] = dict(sorted(document["transformers"].items()))
    results.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def load(results: Path) -> dict[str, Any]:
    if not results.exists():
        return {"schema": SCHEMA, "command": "make models", "transformers": {}}
    document: dict[str, Any] = json.loads(results.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{results} is not of schema {SCHEMA}")
    return document


def registry() -> dict[str, Any]:
    """Every family by name, as its adapter declares it."""
    from fastattn.models.family import known_families, load_family

    return {name: load_family(name) for name in known_families()}


def block(families: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """The two tables and the notes, markers included."""
    versions: Mapping[str, Any] = document["transformers"]
    names = _names(versions)
    lines = [
        BEGIN,
        "",
        "## What is swapped",
        "",
        "| family | attention | layers of its own |",
        "|---|---|---|",
    ]
    for name, family in sorted(families.items(), key=lambda item: names.get(item[0], [item[0]])[0].lower()):
        # torch.nn's layers are tested on their own: they are no one architecture.
        called = ", ".join(names.get(name, [name.replace("_", ".")]))
        lines.append(f"| {called} | {_text(family.attention)} | {_sites(family)} |")
    tested = " and ".join(f"transformers {version}" for version in versions)
    lines += ["", "## What is tested", "", f"With {tested} (`{document['command']}`)." if tested else ""]
    lines += ["", f"| model | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for case in _cases(versions):
        cells = [_cell(case, tests, versions, reasons) for tests in COLUMNS.values()]
        lines.append(f"| {case} | {' | '.join(cells)} |")
    if reasons:
        lines += ["", "Where a cell has a number:", ""]
        lines += [f"{index}. {_text(reason)}" for index, reason in enumerate(reasons, 1)]
    limits = [f"- {name}: {limit}" for name, family in sorted(families.items()) for limit in family.limits]
    if limits:
        lines += ["", "## What is left as it is", "", *limits]
    return "\n".join([*lines, "", END])


def _names(versions: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the tests call the models of each family."""
    names: dict[str, list[str]] = {}
    for found in versions.values():
        for case, entry in found["cases"].items():
            called = names.setdefault(entry["family"], [])
            if case not in called:
                called.append(case)
    return names


def _cases(versions: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(case for found in versions.values() for case in found["cases"]))


def _sites(family: Any) -> str:
    found = dict.fromkeys(KINDS[site.kind] for site in family.sites if site.kind in KINDS)
    own = ["attention"] if any(site.kind == "attention" for site in family.sites) else []
    return ", ".join([*own, *found]) or "none: attention only"


def _cell(case: str, tests: Iterable[str], versions: Mapping[str, Any], reasons: dict[str, list[str]]) -> str:
    found = [
        (version, entry["cases"][case]["tests"][test])
        for version, entry in versions.items()
        for test in tests
        if test in entry["cases"].get(case, {"tests": {}})["tests"]
    ]
    outcomes = {each["outcome"] for _, each in found}
    for outcome, shown in ((FAILED, "fails"), (EXPECTED, "not yet")):
        where = sorted({version for version, each in found if each["outcome"] == outcome})
        if where:
            return shown if len(where) == len(versions) else f"{shown} in {', '.join(where)}"
    if PASSED in outcomes:
        return "yes"
    numbers = {_number(each["reason"], reasons) for _, each in found if each["outcome"] == SKIPPED}
    return "-" + "".join(f" ({number})" for number in sorted(numbers))


def _number(reason: str, reasons: dict[str, list[str]]) -> int:
    reasons.setdefault(reason, [])
    return list(reasons).index(reason) + 1


def _text(text: str) -> str:
    return text.replace("|", "/")


def renewed(page: str, families: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """The page's text with fresh tables.

    Raises:
        StaleError: the page does not have each marker once, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise StaleError(f"the page must have {BEGIN} and, after it, {END}, once each")
    before, _, rest = page.partition(BEGIN)
    return before + block(families, document) + rest.partition(END)[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    parser.add_argument("--record", type=Path, nargs="+", default=[], metavar="JUNIT", help="junit files")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.record:
        record(args.record, args.results)
    text = args.page.read_text(encoding="utf-8")
    fresh = renewed(text, registry(), load(args.results))
    if fresh == text:
        return 0
    if args.check:
        print("docs/models.md is out of date: run python benchmarks/models_page.py", file=sys.stderr)
        return 1
    args.page.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
