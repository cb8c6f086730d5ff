"""Plain-text tables, the one way reports are printed."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_table"]


def format_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows under their column heads, columns aligned, numbers to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [
        bool(cells) and all(_is_number(row[i]) for row in cells if row[i] not in ("", "-"))
        for i in range(len(columns))
    ]

    def line(row: Sequence[str]) -> str:
        parts = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        return "  ".join(parts).rstrip()

    return "\n".join([line(list(columns)), line(["-" * width for width in widths]), *map(line, cells)])


def _is_number(cell: str) -> bool:
    try:
        float(cell.rstrip("x%"))
    except ValueError:
        return False
    return True
