"""What benchmarks/quality/ wrote, as tables: the frontier of each model, and what was promised of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.bench.tables import markdown_table

__all__ = ["QUALITY", "quality_lines", "quality_summary"]

QUALITY = "fastattn.quality/1"
_COLUMNS = ("model and what was done", "score", "MB", "ms", "times as fast")


def quality_lines(document: Mapping[str, Any]) -> list[str]:
    """Every point of one file, and its promises."""
    sweep = document["sweep"]
    cells = [_cells(each, each["name"]) for each in sweep["points"]]
    promises = [
        [each["figure"], each["promised"], _number(each["measured"]), "yes" if each["holds"] else "**no**"]
        for each in document["promises"]
    ]
    better = "more" if sweep["higher_is_better"] else "less"
    return [
        f"## Compression: {document['name']}",
        "",
        f"Reproduce with `{document['command']}`.",
        "",
        f"{sweep['model']}; the score is {sweep['metric']} ({better} is better); timed: {sweep['workload']}, "
        "in turns with the untouched model.",
        "",
        *markdown_table(list(_COLUMNS), cells),
        "",
        *markdown_table(["figure", "promised", "measured", "holds"], promises),
        "",
    ]


def quality_summary(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a file: of its points that no other beats in score, size and speed, the best of each."""
    lines = []
    for document in documents:
        sweep = document["sweep"]
        untouched, *points = (
            each for each in sweep["points"] if each["pareto"] or each["name"] == "untouched"
        )
        if not points:
            continue
        sign = 1 if sweep["higher_is_better"] else -1
        # Without the fused layers alone, which compress nothing.
        small = [each for each in points if each["model_bytes"] < untouched["model_bytes"]] or points
        chosen = [
            max(small, key=lambda each: sign * each["score"]),
            max(small, key=lambda each: each["speed_up"]),
            min(small, key=lambda each: each["model_bytes"]),
        ]
        name = f"{document['name']} ({sweep['metric']})"
        lines.append([name, _short(untouched), *(f"{each['name']}: {_short(each)}" for each in chosen)])
    columns = ["model", "untouched", "best score", "fastest", "smallest"]
    return markdown_table(columns, lines) if lines else []


def _short(point: Mapping[str, Any]) -> str:
    return f"{_number(point['score'])}, {point['model_bytes'] / 1e6:.1f} MB, **{point['speed_up']:.2f}x**"


def _cells(point: Mapping[str, Any], name: str) -> list[str]:
    if point["status"] != "measured":
        return [name, f"{point['status']}: {point['reason']}", "", "", ""]
    speed = "" if point["speed_up"] is None else f"**{point['speed_up']:.2f}x**"
    if point["speed_up_low"] is not None:
        speed += f" ({point['speed_up_low']:.2f} to {point['speed_up_high']:.2f})"
    megabytes = "" if point["model_bytes"] is None else f"{point['model_bytes'] / 1e6:.1f}"
    time = "" if point["latency_ms"] is None else f"{point['latency_ms']:.3g}"
    return [name, _number(point["score"]), megabytes, time, speed]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
