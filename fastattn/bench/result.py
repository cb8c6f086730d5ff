"""What a benchmark found, as text, plain values, JSON and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastattn.bench.analysis_text import attribution_text, roofline_text, scaling_text
from fastattn.bench.attribution import Attribution, attributions
from fastattn.bench.files import write_text
from fastattn.bench.ratio import METHOD
from fastattn.bench.report import Cell, Environment, Report, Section, Table, Text
from fastattn.bench.report_sections import (
    attribution_sections,
    cold_start_sections,
    memory_sections,
    parts_sections,
    roofline_sections,
    scaling_sections,
    time_sections,
)
from fastattn.bench.roofline import Roofline
from fastattn.bench.row_table import cold_table, missing_table, plain_cell, row_table
from fastattn.bench.rows import Row
from fastattn.bench.scaling import Scaling
from fastattn.bench.tables import csv_text, markdown_text
from fastattn.bench.workloads import Workload
from fastattn.report import format_table

__all__ = ["SCHEMA", "BenchmarkResult", "Measurement"]

SCHEMA = "fastattn.benchmark/2"
# Loading a model keeps one core busy for seconds; the average over a minute stays well below this share.
_BUSY_SHARE = 0.75
_PARITY_NOTE = (
    "Error: largest difference from the reference (untouched, eager, fp32) at real positions, relative to "
    "the output's largest value, with the limit it is held to. Lower precision is held to a limit of its "
    "own: twice what the untouched model loses in that precision, plus 2 eps."
)


@dataclass(frozen=True)
class Measurement:
    """One workload's rows.

    Attributes:
        workload: what was run.
        rows: one a contender.
        reference: the name of the contender that all answers were compared with; empty where none could run.
    """

    workload: Workload
    rows: tuple[Row, ...]
    reference: str = ""

    @property
    def baseline(self) -> Row | None:
        """The row that ratios are over: the faster of the untouched contenders."""
        return next((row for row in self.rows if row.baseline), None)

    @property
    def tried(self) -> list[Row]:
        """The rows of contenders that are here, whatever became of them."""
        return [row for row in self.rows if row.status != "missing"]

    @property
    def missing(self) -> list[Row]:
        """The rows of contenders that are not here."""
        return [row for row in self.rows if row.status == "missing"]

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
        """The report sections of this workload: its table, times, ratios, parts, memory and cold start."""
        title = str(self.workload)
        sections: list[Section] = [Table(title[0].upper() + title[1:], *row_table(self.tried))]
        for make in (time_sections, parts_sections, memory_sections, cold_start_sections):
            sections += make(self.tried)
        if self.missing:
            sections.append(Table("Not measured", *missing_table(self.missing)))
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
        rooflines: the operations of a model against the machine's ceilings, where asked for.
        scalings: time and memory along an axis, where asked for.
        interrupted: whether it was stopped before its end: the rest was not measured.
    """

    model: dict[str, Any]
    measurements: tuple[Measurement, ...]
    environment: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    rooflines: tuple[Roofline, ...] = ()
    scalings: tuple[Scaling, ...] = ()
    interrupted: bool = False

    @property
    def attributions(self) -> tuple[Attribution, ...]:
        """What part of a speed-up is due to what, by workload and path."""
        return tuple(each for measurement in self.measurements for each in attributions(measurement))

    def table(self) -> str:
        """Plain text: a table a workload, with parity beside every time."""
        parts = [self._headline(), *self.warnings()]
        for measurement in self.measurements:
            base = measurement.baseline
            over = f"; ratios are over {base.name}, the faster untouched model" if base is not None else ""
            parts.append(f"{measurement.workload}{over}\n{_plain(*row_table(measurement.tried))}")
            if any(row.stages_ms for row in measurement.rows):
                parts.append(f"before the first round, once\n{_plain(*cold_table(measurement.tried))}")
            for row in measurement.rows:
                if row.versions:
                    packages = ", ".join(f"{name} {version}" for name, version in row.versions.items())
                    parts.append(f"{row.name} runs in an environment of its own: {packages}")
            if measurement.missing:
                parts.append(f"not measured\n{_plain(*missing_table(measurement.missing))}")
        for attribution in self.attributions:
            if attribution.total is not None:
                parts.append(attribution_text(attribution))
        for each in self.rooflines:
            parts.append(roofline_text(each))
        for scaling in self.scalings:
            parts.append(scaling_text(scaling))
        return "\n\n".join([*parts, f"{_PARITY_NOTE}\nMethod: {METHOD}."])

    def warnings(self) -> list[str]:
        """What a reader must know before trusting a time: that others used the machine too."""
        cpu = self.environment["cpu"]
        load, cores = cpu["load_average"], cpu["usable_cores"]
        found = []
        if self.interrupted:
            found.append("Interrupted: what comes after the last table was not measured.")
        if load is not None and cores and load >= _BUSY_SHARE * cores:
            busy = f"The machine was busy: load {load} on {cores} cores before measuring."
            found.append(f"{busy} Measure again when it is idle.")
        return found

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
                    "reference": each.reference,
                    "rows": [row.to_dict() for row in each.rows],
                }
                for each in self.measurements
            ],
            "attributions": [each.to_dict() for each in self.attributions],
            "rooflines": [each.to_dict() for each in self.rooflines],
            "scalings": [each.to_dict() for each in self.scalings],
            "interrupted": self.interrupted,
        }

    def report(self) -> Report:
        """The page, before it is written: sections can be added to it."""
        sections: list[Section] = []
        for measurement in self.measurements:
            sections += measurement.sections()
            for attribution in attributions(measurement):
                sections += attribution_sections(attribution)
        for each in self.rooflines:
            sections += roofline_sections(each)
        for scaling in self.scalings:
            sections += scaling_sections(scaling, highlights=self._ours())
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

    def write_csv(self, path: str | Path) -> Path:
        """Write one line a row to `path` and return the path.

        Raises:
            OSError: `path` cannot be written.
        """
        return write_text(path, csv_text(self.to_dict()))

    def write_markdown(self, path: str | Path) -> Path:
        """Write a table a workload to `path` and return the path.

        Raises:
            OSError: `path` cannot be written.
        """
        return write_text(path, markdown_text(self.to_dict()))

    def write_html(self, path: str | Path) -> Path:
        """Write a self-contained page to `path` and return the path.

        Raises:
            ImportError: plotly is not installed.
            OSError: `path` cannot be written.
        """
        return self.report().write(path)

    def _ours(self) -> list[str]:
        return [row.name for each in self.measurements for row in each.rows if row.highlight]

    def _headline(self) -> str:
        environment = self.environment
        device = self.settings.get("device", "cpu")
        gpu = environment.get("gpu") or {}
        where = gpu.get("name") if str(device).startswith("cuda") else environment["cpu"]["model"]
        threads = "" if str(device).startswith("cuda") else f", {environment['cpu']['torch_threads']} threads"
        size = f"{self.model['parameters'] / 1e6:.1f}M parameters"
        return f"{self.model['name']}, {size}, on {where or device}{threads}"


def _plain(columns: Sequence[str], cells: Sequence[Sequence[str | Cell | None]]) -> str:
    return format_table(columns, [[plain_cell(cell) for cell in line] for line in cells])
