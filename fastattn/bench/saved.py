"""What our JSON files hold, whichever of their schemas they have: one entry a model and workload."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FAMILIES", "RESULTS", "SUITE", "Measured", "load_json", "measured", "workload_name"]

RESULTS = ("fastattn.benchmark/1", "fastattn.benchmark/2")
SUITE = "fastattn.suite/1"
FAMILIES = "fastattn.families/1"


@dataclass(frozen=True)
class Measured:
    """The rows of one model and one workload.

    Attributes:
        model: a suite's title of the run, else the model's class and size.
        workload: the fields of `Workload`; empty where `model` names what was run too.
        rows: what `Row.to_dict()` gives, by contender, in the file's order.
        baseline: the contender the ratios are over; None where there is none.
        environment: of `capture_environment`.
        device: "cpu", "cuda" or one of its indices.
    """

    model: str
    workload: dict[str, Any]
    rows: dict[str, dict[str, Any]]
    baseline: str | None
    environment: dict[str, Any]
    device: str


def load_json(path: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no JSON object.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} holds a JSON {type(document).__name__}; it must hold an object")
    return document


def measured(document: Mapping[str, Any]) -> list[Measured]:
    """All entries of a result, of a suite of results, or of a run over the families.

    Raises:
        ValueError: the schema is none of those, or a field is missing; the message says which.
    """
    schema = document.get("schema")
    try:
        if schema in RESULTS:
            return _of_result(document, None)
        if schema == SUITE:
            return [each for run in document["runs"] for each in _of_result(run["result"], run["title"])]
        if schema == FAMILIES:
            return [
                _entry(each["run"], {}, each["rows"], None, document["environment"], "cpu")
                for each in document["results"]
            ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"a file of schema {schema!r} lacks {error}") from error
    known = ", ".join((*RESULTS, SUITE, FAMILIES))
    raise ValueError(f"schema is {schema!r}; it must be one of {known}")


def _of_result(result: Mapping[str, Any], title: str | None) -> list[Measured]:
    model = result["model"]
    name = title or f"{model['name']}, {model['parameters'] / 1e6:.1f}M parameters"
    device = str(result["settings"].get("device", "cpu"))
    return [
        _entry(
            name, _workload(each["workload"]), each["rows"], each["baseline"], result["environment"], device
        )
        for each in result["measurements"]
    ]


def _entry(
    model: str,
    workload: dict[str, Any],
    rows: list[dict[str, Any]],
    baseline: str | None,
    environment: dict[str, Any],
    device: str,
) -> Measured:
    baseline = baseline or next((row["name"] for row in rows if row["baseline"]), None)
    return Measured(model, workload, {row["name"]: row for row in rows}, baseline, environment, device)


def _workload(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a workload; those the first schema did not have as they were then."""
    return {"task": "encode", "new_tokens": 0, **fields}


def workload_name(workload: Mapping[str, Any]) -> str:
    """A workload's fields as a reader names it.

    Example:
        >>> workload_name({"batch": 8, "seq": 128, "fill": 0.47, "task": "decode", "new_tokens": 64})
        'decode 8 x 128, 47% fill, 64 new tokens'
    """
    if not workload:
        return ""
    task = workload.get("task", "encode")
    shape = f"{workload['batch']} x {workload['seq']}, {workload['fill']:.0%} fill"
    more = f", {workload['new_tokens']} new tokens" if workload.get("new_tokens") else ""
    return f"{task} {shape}{more}"
