"""The HTML writer: one self-contained page (plotly's script inline, no network) out of a list of sections.

    Report(
        title="MiniLM on this machine",
        summary=["fastattn is 2.1x faster than SDPA.", "Every row was compared with the untouched model."],
        sections=[
            Text("What ran", ["One paragraph.", "Another."]),
            Table("Times", ["contender", "ms"], [["eager", "12.3"], ["fastattn", Cell("5.1", "good")]]),
            TimePlot("Time a batch", [Bar("eager", 12.3, low=12.0, high=13.1), Bar("ours", 5.1, 5.0, 5.4)]),
            RatioPlot("Speed-up over SDPA", [Point("fastattn", 2.10, low=2.02, high=2.17, highlight=True)]),
            Environment({"cpu": {"model": "..."}, "torch": "..."}),
        ],
    ).write("report.html")

Plots are in report_bars.py (one row a contender), report_lines.py and report_scatter.py (two axes);
report_sections.py makes sections out of results. Every string is escaped. `Report.html()` gives the page as a
string. A page follows the reader's light or dark setting, and its security policy forbids every request, so
it cannot load anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from fastattn.bench.files import write_text
from fastattn.bench.report_bars import Bar, BarsPlot, Fall, Point, RatioPlot, TimePlot, Waterfall
from fastattn.bench.report_lines import Line, LinePlot, Roof, RooflinePlot, RoofOp
from fastattn.bench.report_page import PAGE
from fastattn.bench.report_scatter import Spot, SpotPlot

__all__ = [
    "Bar",
    "BarsPlot",
    "Cell",
    "Environment",
    "Fall",
    "Line",
    "LinePlot",
    "Point",
    "RatioPlot",
    "Report",
    "Roof",
    "RoofOp",
    "RooflinePlot",
    "Section",
    "Spot",
    "SpotPlot",
    "Table",
    "Text",
    "TimePlot",
    "Waterfall",
    "require_plotly",
]

TONES = ("plain", "good", "bad", "muted")


@dataclass(frozen=True)
class Cell:
    """A table cell with a tone: "plain", "good", "bad" or "muted"."""

    text: str
    tone: str = "plain"

    def __post_init__(self) -> None:
        if self.tone not in TONES:
            raise ValueError(f"tone is {self.tone!r}; it must be one of {', '.join(TONES)}")


@dataclass(frozen=True)
class Text:
    """A heading (may be empty) and paragraphs of plain text."""

    heading: str
    paragraphs: Sequence[str]


@dataclass(frozen=True)
class Table:
    """A table of strings, numbers, None (a dash) and `Cell`s. Columns of numbers are right-aligned."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | Cell | None]]
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"a row of {len(row)} cells in a table of {len(self.columns)} columns: {row!r}"
                )


@dataclass(frozen=True)
class Environment:
    """Names and values of where the measurement ran; nested mappings and lists are flattened."""

    values: Mapping[str, Any]
    heading: str = "Environment"


Plot = TimePlot | RatioPlot | BarsPlot | Waterfall | LinePlot | RooflinePlot | SpotPlot
Section = Text | Table | Environment | Plot


@dataclass(frozen=True)
class Report:
    """A page: a title, sentences that sum it up, and sections in order; neighbouring plots share a row.

    Example:
        >>> page = Report("Times", ["One table."], [Table("", ["name", "ms"], [["eager", 1.5]])])
        >>> "<td" in page.html(scripts=False)
        True
    """

    title: str
    summary: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=tuple)

    def html(self, *, scripts: bool = True) -> str:
        """The page as a string; `scripts=False` leaves plotly's 4 MB script and so the plots out.

        Raises:
            ImportError: plotly is not installed and `scripts` is true.
        """
        body = []
        for is_plot, sections in groupby(self.sections, lambda each: isinstance(each, Plot)):
            parts = [_render(section) for section in sections]
            body.append(f'<div class="plots">{"".join(parts)}</div>' if is_plot else "".join(parts))
        summary = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.summary)
        return PAGE.substitute(
            title=escape(self.title),
            summary=f'<ul class="summary">{summary}</ul>' if summary else "",
            body="\n".join(body),
            plotly=_plotly_script() if scripts else "",
        )

    def write(self, path: str | Path) -> Path:
        """Write the page to `path` and return it; no partial file is left if that fails.

        Raises:
            ImportError: plotly is not installed.
            OSError: `path` cannot be written.
        """
        return write_text(path, self.html())


def require_plotly() -> None:
    """Raise ImportError with the way out where plotly is missing: called before measuring, not after."""
    try:
        import plotly.offline  # noqa: F401
    except ImportError as error:
        raise ImportError('the HTML report needs plotly: pip install "fastattn[bench]"') from error


def _plotly_script() -> str:
    require_plotly()
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _render(section: Section) -> str:
    heading = f"<h2>{escape(section.heading)}</h2>" if section.heading else ""
    if isinstance(section, Text):
        content = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in section.paragraphs)
    elif isinstance(section, Table):
        content = _table(section.columns, section.rows) + _note(section.note)
    elif isinstance(section, Environment):
        content = _table(("", ""), list(_flatten(section.values)), css="environment")
    else:
        # A "<" inside a script element could close it early.
        data = json.dumps(section.figure(), allow_nan=False).replace("<", "\\u003c")
        content = (
            f'<div class="figure" role="img" aria-label="{escape(section.heading)}">'
            f'<script type="application/json">{data}</script></div>{_note(section.note)}'
        )
    return f"<section>{heading}{content}</section>"


def _note(note: str) -> str:
    return f'<p class="note">{escape(note)}</p>' if note else ""


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], css: str = "") -> str:
    # A remark in place of a figure ("out of memory") does not make its column one of text.
    figures = [
        [
            row[index]
            for row in rows
            if not isinstance(row[index], Cell) or row[index].tone in ("plain", "good")
        ]
        for index in range(len(columns))
    ]
    numeric = [bool(cells) and all(map(_is_number, cells)) for cells in figures]

    def cell(value: Any, tag: str, right: bool) -> str:
        tone = value.tone if isinstance(value, Cell) else "plain"
        # A long text wraps; figures, intervals and names stay on one line.
        marks = {tone: tone != "plain", "number": right, "long": len(_text(value)) > 48}
        classes = " ".join(name for name, holds in marks.items() if holds)
        attribute = f' class="{classes}"' if classes else ""
        return f"<{tag}{attribute}>{escape(_text(value))}</{tag}>"

    head = "".join(cell(name, "th", right) for name, right in zip(columns, numeric, strict=True))
    body = "".join(
        f"<tr>{''.join(cell(value, 'td', right) for value, right in zip(row, numeric, strict=True))}</tr>"
        for row in rows
    )
    header = f"<thead><tr>{head}</tr></thead>" if any(columns) else ""
    attribute = f' class="{css}"' if css else ""
    return f'<div class="scroll"><table{attribute}>{header}<tbody>{body}</tbody></table></div>'


def _text(value: Any) -> str:
    if isinstance(value, Cell):
        return value.text
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(value: Any) -> bool:
    """Whether a cell reads as a figure: a number, a dash, or text that starts with a digit or a sign."""
    text = _text(value)
    return text in ("", "-") or text.lstrip("+-~<>≤≥ ")[:1].isdigit()


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in values.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, Mapping):
            rows += _flatten(value, prefix=f"{label}: ")
        elif isinstance(value, list | tuple):
            rows.append((label, ", ".join(map(str, value)) or "none"))
        elif isinstance(value, bool):
            rows.append((label, "yes" if value else "no"))
        else:
            rows.append((label, _text(value)))
    return rows
