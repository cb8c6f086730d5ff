"""What a benchmark found, as text, plain values, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn.bench.files import write_text
from fastattn.bench.ratio import METHOD, Ratio
from fastattn.bench.report import (
    Bar,
    Cell,
    Environment,
    Point,
    RatioPlot,
    Report,
    Section,
    Table,
    Text,
    TimePlot,
)
from fastattn.bench.rows import Row
from fastattn.bench.workloads import Workload
from fastattn.report import format_table

__all__ = ["SCHEMA", "BenchmarkResult", "Measurement", "plain_cell", "row_table"]

SCHEMA = "fastattn.benchmark/1"
# Loading a model keeps one core busy for seconds; the average over a minute stays well below this share.
_BUSY_SHARE = 0.75
_PARITY_NOTE = (
    "Error: largest difference from the reference (untouched, eager, fp32) at real positions, relative to "
    "the output's largest value, with the limit it is held to. Lower precision is held to a limit of its "
    "own: twice what the untouched model loses in that precision, plus 2 eps."
)


@dataclass(frozen=True)
class Measurement:
    """One workload's rows."""

    workload: Workload
    rows: tuple[Row, ...]

    @property
    def baseline(self) -> Row | None:
        """The row that ratios are over: the faster of the untouched contenders."""
        return next((row for row in self.rows if row.baseline), None)

    def row(self, name: str) -> Row:
        """The row of a contender.

        Raises:
            KeyError: there is none of that name; the message lists the names.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"no contender {name!r}; there are {', '.join(row.name for row in self.rows)}")

    def sections(self) -> list[Section]:
        """The report sections of this workload: its table, times and ratios."""
        title = str(self.workload)
        title = title[0].upper() + title[1:]
        sections: list[Section] = [Table(title, *row_table(self.rows))]
        bars = [
            Bar(row.name, row.median_ms, row.min_ms, row.high_ms, row.highlight)
            for row in self.rows
            if row.median_ms is not None and row.min_ms is not None and row.high_ms is not None
        ]
        if bars:
            note = "Bar: median; whisker: minimum to 90th percentile."
            sections.append(TimePlot(f"Time a batch, {self.workload}", bars, note=note))
        points = [
            Point(r.name, r.ratio.value, r.ratio.low, r.ratio.high, r.highlight) for r in self.rows if r.ratio
        ]
        if points and self.baseline is not None:
            note = "Median over paired rounds with its 95% interval."
            sections.append(
                RatioPlot(f"Speed-up over {self.baseline.name}, {self.workload}", points, note=note)
            )
        return sections

    def sentences(self) -> list[str]:
        """One sentence for each of our contenders that was measured and was right."""
        base = self.baseline
        sentences = []
        for row in self.rows:
            if base is None or not row.highlight or row.ratio is None or row.parity is None:
                continue
            times = f"{row.name} takes {row.median_ms:.4g} ms against {base.median_ms:.4g} ms for {base.name}"
            interval = f"{row.ratio.value:.2f}x (95% interval {row.ratio.low:.2f} to {row.ratio.high:.2f})"
            if row.ratio.low <= 1 <= row.ratio.high:
                interval += ", which this run cannot tell from equal"
            error = f"largest error {row.parity.relative_error:.1e} of the output's scale"
            sentences.append(f"{self.workload}: {times}, the faster untouched model: {interval}, {error}.")
        return sentences


@dataclass(frozen=True)
class BenchmarkResult:
    """What `fastattn.benchmark` returns.

    Attributes:
        model: "name" (the class), "parameters" (their number) and what else identifies it.
        measurements: one a workload.
        environment: of `capture_environment`.
        settings: what was asked for.
    """

    model: dict[str, Any]
    measurements: tuple[Measurement, ...]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def table(self) -> str:
        """Plain text: a table a workload, with parity beside every time."""
        parts = [self._headline(), *self.warnings()]
        for measurement in self.measurements:
            base = measurement.baseline
            over = f"; ratios are over {base.name}, the faster untouched model" if base is not None else ""
            columns, cells = row_table(measurement.rows)
            plain = [[plain_cell(cell) for cell in line] for line in cells]
            parts.append(f"{measurement.workload}{over}\n{format_table(columns, plain)}")
        return "\n\n".join([*parts, f"{_PARITY_NOTE}\nMethod: {METHOD}."])

    def warnings(self) -> list[str]:
        """What a reader must know before trusting a time: that others used the machine too."""
        cpu = self.environment["cpu"]
        load, cores = cpu["load_average"], cpu["usable_cores"]
        if load is None or not cores or load < _BUSY_SHARE * cores:
            return []
        busy = f"The machine was busy: load {load} on {cores} cores before measuring."
        return [f"{busy} Measure again when it is idle."]

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; "schema" names their layout."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "settings": self.settings,
            "method": METHOD,
            "environment": self.environment,
            "warnings": self.warnings(),
            "measurements": [
                {
                    "workload": each.workload.to_dict(),
                    "baseline": each.baseline.name if each.baseline else None,
                    "rows": [row.to_dict() for row in each.rows],
                }
                for each in self.measurements
            ],
        }

    def report(self) -> Report:
        """The page, before it is written: sections can be added to it."""
        sections: list[Section] = []
        for measurement in self.measurements:
            sections += measurement.sections()
        sections += [
            Text("How it was measured", [f"{METHOD[0].upper()}{METHOD[1:]}.", _PARITY_NOTE]),
            Environment(self.environment),
        ]
        sentences = [sentence for each in self.measurements for sentence in each.sentences()]
        return Report(self._headline(), [*self.warnings(), *sentences], sections)

    def write_json(self, path: str | Path) -> Path:
        """Write `to_dict()` to `path`, whole or not at all, and return the path.

        Raises:
            OSError: `path` cannot be written.
        """
        return write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    def write_html(self, path: str | Path) -> Path:
        """Write a self-contained page to `path` and return the path.

        Raises:
            ImportError: plotly is not installed.
            OSError: `path` cannot be written.
        """
        return self.report().write(path)

    def _headline(self) -> str:
        environment = self.environment
        device = self.settings.get("device", "cpu")
        gpu = environment.get("gpu") or {}
        where = gpu.get("name") if str(device).startswith("cuda") else environment["cpu"]["model"]
        threads = "" if str(device).startswith("cuda") else f", {environment['cpu']['torch_threads']} threads"
        size = f"{self.model['parameters'] / 1e6:.1f}M parameters"
        return f"{self.model['name']}, {size}, on {where or device}{threads}"


def row_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str | Cell | None]]]:
    """The columns and cells of a table of rows; a column none of them needs is left out.

    A ratio is there only beside a parity that passed.
    """
    base = next((row.name for row in rows if row.baseline), "the baseline")
    columns = ["contender", "min ms", "median ms", "CPU ms", f"over {base} (95%)"]
    has_against, has_note = any(row.against_ratio for row in rows), any(row.reason for row in rows)
    columns += ["over the same dtype"] * has_against + ["error and limit"] + ["note"] * has_note
    cells = []
    for row in rows:
        times = (row.min_ms, row.median_ms, row.cpu_median_ms)
        line: list[str | Cell | None] = [
            row.name,
            *(None if each is None else f"{each:.4g}" for each in times),
        ]
        line.append(Cell("baseline", "muted") if row.baseline else _text(row.ratio))
        if has_against:
            line.append(_text(row.against_ratio))
        tone = "good" if row.parity is not None and row.parity.passed else "bad"
        line.append(None if row.parity is None else Cell(str(row.parity), tone))
        if has_note:
            line.append(Cell(row.reason, "bad" if row.status in ("wrong", "failed") else "muted"))
        cells.append(line)
    return columns, cells


def _text(ratio: Ratio | None) -> str | None:
    return None if ratio is None else str(ratio)


def plain_cell(cell: str | Cell | None) -> str:
    """A cell of a report's table as plain text, "-" where it is empty."""
    return "-" if cell is None else cell.text if isinstance(cell, Cell) else cell
