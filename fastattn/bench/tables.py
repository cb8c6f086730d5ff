"""A result as CSV (one line a row) and as Markdown (a table a workload), from its plain values."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.bench.rows import PERCENTILES, outliers, percentiles
from fastattn.bench.saved import Measured, measured, workload_name

__all__ = [
    "COLUMNS",
    "csv_text",
    "escaped",
    "markdown_table",
    "markdown_text",
    "workload_table",
]

_PARTS = ("first_token_ms", "inter_token_ms", "forward_ms", "backward_ms")
_MIB = 1024 * 1024

# The order is part of the format: new columns go to the end.
COLUMNS = (
    # What was run. `model` is a suite's title, else the model's class and size; `fill` is a fraction.
    "model", "workload", "task", "batch", "seq", "fill", "new_tokens", "seed",
    # By what, and what came of it: "measured", "missing", "failed" or "wrong", with the reason.
    "contender", "precision", "status", "reason",
    # Milliseconds a call, over the rounds, and how many were far off the others; `cpu_ms` is processor time
    # of all threads, `device_ms` between events on the GPU, both medians.
    "rounds", "min_ms", "p50_ms", "p90_ms", "p99_ms", "outliers", "cpu_ms", "device_ms",
    # Cold, once: the first call, the sum of the stages before it, and each stage as "name=ms; name=ms".
    "first_call_ms", "stages_ms", "stages",
    # Times as fast as `baseline`, with the ends of the 95% interval.
    "baseline", "ratio", "ratio_low", "ratio_high",
    # Largest error relative to the output's largest value, and the limit it is held to.
    "error", "tolerance",
    "peak_host_bytes", "peak_device_bytes", "energy_j",
    # Percentiles of the named parts of a call over all rounds; other parts as "name_p50=ms; ...".
    *(f"{part.removesuffix('_ms')}_p{level}_ms" for part in _PARTS for level in PERCENTILES),
    "other_parts",
)  # fmt: skip


def csv_text(document: Mapping[str, Any]) -> str:
    """A result or a suite of results as CSV: a head line and one line a row, columns as in `COLUMNS`.

    Args:
        document: what `BenchmarkResult.to_dict()` gives, or a file of benchmarks/results.

    Raises:
        ValueError: its schema is none that is known; the message lists them.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for each in measured(document):
        writer.writerows(_line(each, row) for row in each.rows.values())
    return text.getvalue()


def _line(each: Measured, row: Mapping[str, Any]) -> dict[str, Any]:
    workload = each.workload
    line: dict[str, Any] = {"model": each.model, "workload": workload_name(workload)}
    line |= {name: workload.get(name, "") for name in ("task", "batch", "seq", "fill", "new_tokens", "seed")}
    line |= {
        "contender": row["name"],
        "precision": row["dtype"],
        "status": row["status"],
        "reason": row["reason"],
    }
    wall = row["wall_ms"]
    line["rounds"] = len(wall)
    if wall:
        line |= {"min_ms": min(wall), "outliers": outliers(wall)}
        line |= {f"p{level}_ms": value for level, value in percentiles(wall).items()}
    line |= {name: percentiles(samples)[50] for name in ("cpu_ms", "device_ms") if (samples := row.get(name))}
    line["first_call_ms"] = _blank(row["first_call_ms"])
    if stages := row.get("stages_ms"):
        line["stages_ms"] = sum(stages.values())
        line["stages"] = "; ".join(f"{name}={value:.6g}" for name, value in stages.items())
    if ratio := row["ratio"]:
        line |= {"baseline": ratio["baseline"], "ratio": ratio["value"]}
        line |= {"ratio_low": ratio["low"], "ratio_high": ratio["high"]}
    if parity := row["parity"]:
        line |= {"error": parity["relative_error"], "tolerance": parity["tolerance"]}
    line |= {name: _blank(row.get(name)) for name in ("peak_host_bytes", "peak_device_bytes", "energy_j")}
    others = []
    for part, values in (row.get("parts_ms") or {}).items():
        if not values:
            continue
        short = part.removesuffix("_ms")
        if part in _PARTS:
            line |= {f"{short}_p{level}_ms": value for level, value in percentiles(values).items()}
        else:
            others.append(f"{short}_p50={percentiles(values)[50]:.6g}")
    line["other_parts"] = "; ".join(others)
    return line


def _blank(value: Any) -> Any:
    return "" if value is None else value


def markdown_text(document: Mapping[str, Any]) -> str:
    """A result or a suite of results as Markdown: a table a workload, below its heading and baseline.

    A column that no row fills is left out; a ratio is there only beside a parity that passed.

    Raises:
        ValueError: the schema is none that is known.
    """
    parts = []
    for each in measured(document):
        heading = ": ".join(part for part in (each.model, workload_name(each.workload)) if part)
        parts += [f"### {escaped(heading)}", ""]
        if each.baseline:
            parts += [f"Ratios are over {escaped(each.baseline)}.", ""]
        parts += [*markdown_table(*workload_table(each)), ""]
    return "\n".join(parts)


def workload_table(each: Measured) -> tuple[list[str], list[list[str]]]:
    """The columns and cells of one workload's table, as plain text; empty where there is no figure."""
    columns = ["contender", "min ms", "p50 ms", "p90 ms", "p99 ms", "CPU ms", "first call ms", "stages ms"]
    columns += ["host MiB", "device MiB", "joules", "times as fast (95%)", "error", "limit", "note"]
    parts = list(dict.fromkeys(part for row in each.rows.values() for part in row.get("parts_ms") or {}))
    columns[6:6] = [f"{part.removesuffix('_ms').replace('_', ' ')} ms" for part in parts]
    lines = []
    for row in each.rows.values():
        wall, parity, ratio = row["wall_ms"], row["parity"], row["ratio"]
        times = [min(wall), *percentiles(wall).values()] if wall else [None] * 4
        cpu = percentiles(row["cpu_ms"])[50] if row.get("cpu_ms") else None
        values = [(row.get("parts_ms") or {}).get(part) for part in parts]
        stages = row.get("stages_ms") or {}
        memory = [row.get(name) for name in ("peak_host_bytes", "peak_device_bytes")]
        figures = [
            *times,
            cpu,
            *(percentiles(value)[50] if value else None for value in values),
            row["first_call_ms"],
            sum(stages.values()) if stages else None,
            *(None if peak is None else peak / _MIB for peak in memory),
            row.get("energy_j"),
        ]
        speed = "1" if row["name"] == each.baseline else ""
        if ratio and parity and parity["passed"]:
            speed = f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        errors = [f"{parity[name]:.1e}" for name in ("relative_error", "tolerance")] if parity else ["", ""]
        numbers = ["" if figure is None else f"{figure:.4g}" for figure in figures]
        lines.append([row["name"], *numbers, speed, *errors, row["reason"]])
    used = [index for index in range(len(columns)) if any(line[index] for line in lines)]
    return [columns[index] for index in used], [[line[index] for index in used] for line in lines]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; an empty cell is a dash, and pipes and angle brackets are escaped."""
    lines = [f"| {' | '.join(map(escaped, columns))} |", f"|{'---|' * len(columns)}"]
    return lines + [f"| {' | '.join(escaped(cell) or '-' for cell in row)} |" for row in rows]


def escaped(text: str) -> str:
    """`text` on one line, its pipes and angle brackets harmless in Markdown."""
    harmless = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(harmless.split())
