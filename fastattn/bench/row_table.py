"""Rows as tables: the warm times with parity beside them, and what was paid once before."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from fastattn.bench.ratio import Ratio
from fastattn.bench.report import Cell
from fastattn.bench.rows import Row

__all__ = ["cold_table", "missing_table", "plain_cell", "row_table"]

_Cells = list[list[str | Cell | None]]
# Parts of a call that get a column where a row has them.
_PARTS = {
    "first_token_ms": "first token ms",
    "inter_token_ms": "ms a token",
    "forward_ms": "forward ms",
    "backward_ms": "backward ms",
}


def row_table(rows: Sequence[Row]) -> tuple[list[str], _Cells]:
    """The columns and cells of a table of rows; a column none of them needs is left out.

    A ratio is there only beside a parity that passed.
    """
    base = next((row.name for row in rows if row.baseline), "the baseline")
    parts = [name for name in _PARTS if any(row.parts_ms.get(name) for row in rows)]
    has_memory = any(row.peak_host_bytes is not None for row in rows)
    has_device = any(row.peak_device_bytes is not None for row in rows)
    has_against, has_note = any(row.against_ratio for row in rows), any(row.reason for row in rows)
    columns = ["contender", "min ms", "median ms", "p90 ms", *(_PARTS[name] for name in parts), "CPU ms"]
    columns += [f"over {base} (95%)"] + ["over the same dtype"] * has_against
    columns += (
        ["peak MiB"] * has_memory + ["GPU MiB"] * has_device + ["error and limit"] + ["note"] * has_note
    )
    cells: _Cells = []
    for row in rows:
        line: list[str | Cell | None] = [row.name, _ms(row.min_ms), _ms(row.median_ms), _ms(row.p90_ms)]
        line += [
            _ms(statistics.median(row.parts_ms[name])) if row.parts_ms.get(name) else None for name in parts
        ]
        line.append(_ms(row.cpu_median_ms))
        line.append(Cell("baseline", "muted") if row.baseline else _ratio(row.ratio))
        line += [_ratio(row.against_ratio)] * has_against
        line += [_mebibytes(row.peak_host_bytes)] * has_memory + [
            _mebibytes(row.peak_device_bytes)
        ] * has_device
        tone = "good" if row.parity is not None and row.parity.passed else "bad"
        line.append(None if row.parity is None else Cell(str(row.parity), tone))
        if has_note:
            line.append(Cell(row.reason, "bad" if row.status in ("wrong", "failed") else "muted"))
        cells.append(line)
    return columns, cells


def cold_table(rows: Sequence[Row]) -> tuple[list[str], _Cells]:
    """What each contender pays once, in seconds: a column a stage, then the first call."""
    known = [row for row in rows if row.first_call_ms is not None]
    stages = list(dict.fromkeys(stage for row in known for stage in row.stages_ms))
    cells: _Cells = [
        [row.name, *(_seconds(row.stages_ms.get(stage)) for stage in stages), _seconds(row.first_call_ms)]
        for row in known
    ]
    return ["contender", *(f"{stage} s" for stage in stages), "first call s"], cells


def missing_table(rows: Sequence[Row]) -> tuple[list[str], _Cells]:
    """Contenders that are not here, and how to get them."""
    return ["contender", "missing"], [[row.name, row.reason.removeprefix("missing: ")] for row in rows]


def plain_cell(cell: str | Cell | None) -> str:
    """A cell of a report's table as plain text, "-" where it is empty."""
    return "-" if cell is None else cell.text if isinstance(cell, Cell) else cell


def _ms(value: float | None) -> str | None:
    return None if value is None else f"{value:.4g}"


def _seconds(value_ms: float | None) -> str | None:
    return (
        None if value_ms is None else f"{value_ms / 1e3:.2g}" if value_ms < 9950 else f"{value_ms / 1e3:.0f}"
    )


def _mebibytes(value: int | None) -> str | None:
    return None if value is None else f"{value / 2**20:.0f}"


def _ratio(ratio: Ratio | None) -> str | None:
    return None if ratio is None else str(ratio)
