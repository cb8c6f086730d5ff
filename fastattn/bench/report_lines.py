"""Plots with two axes: a quantity against length, batch or fill, and operations below the machine's roof."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fastattn.bench.report_bars import SERIES_COLOURS

__all__ = ["Line", "LinePlot", "Roof", "RoofOp", "RooflinePlot"]

_HEIGHT_PX = 420
_DASHES = ("solid", "dash", "dot", "dashdot")
_SYMBOLS = ("circle", "diamond", "square", "triangle-up")
# From this quotient of largest to smallest on, equal steps of a linear axis hide the small ones.
_LOG_FROM = 8
# More numbers than this on markers run into one another.
_NUMBERED = 30


@dataclass(frozen=True)
class Line:
    """One contender: (x, y, low, high) a point, and (x, y) along its fitted curve where it has one."""

    label: str
    points: Sequence[tuple[float, float, float, float]]
    curve: Sequence[tuple[float, float]] = ()
    highlight: bool = False


@dataclass(frozen=True)
class LinePlot:
    """Points with whiskers, a colour a line, the fitted curve through them, and a legend that hides lines.

    An axis is logarithmic where its largest value is eight times its smallest or more and none is zero.

    Attributes:
        x_title, y_title: what the axes show, with the unit.
    """

    heading: str
    lines: Sequence[Line]
    x_title: str
    y_title: str
    note: str = ""

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        traces: list[dict[str, Any]] = []
        for index, line in enumerate(self.lines):
            # Past the last colour they start again, with another dash and marker.
            again = index // SERIES_COLOURS % len(_DASHES)
            colour, dash = f"s{index % SERIES_COLOURS}", _DASHES[again]
            width = 2.6 if line.highlight else 1.6
            shared = {"type": "scatter", "name": escape(line.label), "legendgroup": str(index)}
            hover = [
                f"{escape(line.label)}<br>{escape(self.x_title)}: {x:.4g}<br>{escape(self.y_title)}: {y:.4g} "
                f"({low:.4g} to {high:.4g})"
                for x, y, low, high in line.points
            ]
            traces.append(
                shared
                | {
                    "showlegend": True,
                    "mode": "markers" if line.curve else "lines+markers",
                    "x": [x for x, *_ in line.points],
                    "y": [y for _, y, *_ in line.points],
                    "line": {"color": colour, "width": width, "dash": dash},
                    "marker": {
                        "color": colour,
                        "size": 9 if line.highlight else 7,
                        "symbol": _SYMBOLS[again],
                    },
                    "error_y": {
                        "type": "data",
                        "symmetric": False,
                        "array": [high - y for _, y, _, high in line.points],
                        "arrayminus": [y - low for _, y, low, _ in line.points],
                        "color": colour,
                        "thickness": 1.2,
                        "width": 4,
                    },
                    "hovertext": hover,
                    "hovertemplate": "%{hovertext}<extra></extra>",
                }
            )
            if line.curve:
                traces.append(
                    shared
                    | {
                        "mode": "lines",
                        "x": [x for x, _ in line.curve],
                        "y": [y for _, y in line.curve],
                        "line": {"color": colour, "width": width, "dash": dash},
                        "hoverinfo": "skip",
                    }
                )
        across = sorted({x for line in self.lines for x, *_ in line.points})
        up = [value for line in self.lines for point in line.points for value in point[1:]]
        up += [y for line in self.lines for _, y in line.curve]
        layout = {"xaxis": _axis(self.x_title, across, across), "yaxis": _axis(self.y_title, up)}
        if layout["yaxis"].get("type") != "log":
            layout["yaxis"]["rangemode"] = "tozero"
        return {"height": _HEIGHT_PX, "data": traces, "layout": layout}


@dataclass(frozen=True)
class Roof:
    """The most the machine does of a dtype at every intensity: bandwidth up to the ridge, then arithmetic."""

    label: str
    bytes_per_s: float
    flop_per_s: float


@dataclass(frozen=True)
class RoofOp:
    """An operation: FLOP a byte, FLOP a second, and its number in the table beside the plot.

    Attributes:
        roof: the label of the roof it is under.
        share: of the time of all operations, 0 to 1: the marker's size.
        notes: lines shown on hovering.
    """

    number: int
    label: str
    intensity: float
    flop_per_s: float
    roof: str
    share: float
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class RooflinePlot:
    """Operations as numbered points below the roofs, both axes logarithmic (Williams, Waterman and Patterson,
    "Roofline", Communications of the ACM 52(4), 2009)."""

    heading: str
    roofs: Sequence[Roof]
    ops: Sequence[RoofOp]
    note: str = ""

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        ridges = [roof.flop_per_s / roof.bytes_per_s for roof in self.roofs]
        across = [op.intensity for op in self.ops] + ridges
        left, right = min(across, default=0.1) / 3, max(across, default=100.0) * 3
        traces: list[dict[str, Any]] = []
        for index, (roof, ridge) in enumerate(zip(self.roofs, ridges, strict=True)):
            colour = f"s{index % SERIES_COLOURS}"
            ops = [op for op in self.ops if op.roof == roof.label]
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": escape(roof.label),
                    "legendgroup": str(index),
                    "showlegend": True,
                    "x": [left, ridge, right],
                    "y": [left * roof.bytes_per_s, roof.flop_per_s, roof.flop_per_s],
                    "line": {"color": colour, "width": 2, "dash": "solid"},
                    "hoverinfo": "skip",
                }
            )
            numbered = len(self.ops) <= _NUMBERED
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers+text" if numbered else "markers",
                    "legendgroup": str(index),
                    "x": [op.intensity for op in ops],
                    "y": [op.flop_per_s for op in ops],
                    "text": [str(op.number) for op in ops],
                    "textfont": {"color": "page", "size": 11},
                    # The area grows with the share of the time.
                    "marker": {
                        "color": colour,
                        "opacity": 0.9,
                        "size": [(17 if numbered else 8) + 26 * math.sqrt(op.share) for op in ops],
                        "line": {"color": "page", "width": 1},
                    },
                    "hovertext": [
                        "<br>".join(map(escape, (f"{op.number}. {op.label}", *op.notes))) for op in ops
                    ],
                    "hovertemplate": "%{hovertext}<extra></extra>",
                }
            )
        up = [op.flop_per_s for op in self.ops] + [roof.flop_per_s for roof in self.roofs]
        lowest, highest = min(up, default=1e9) / 2.5, max(up, default=1e12) * 1.8
        layout = {
            "xaxis": _log_axis("FLOP a byte", left, right),
            "yaxis": _log_axis("FLOP a second", lowest, highest, si=True),
        }
        return {"height": _HEIGHT_PX, "data": traces, "layout": layout}


def _axis(title: str, values: Sequence[float], ticks: Sequence[float] = ()) -> dict[str, Any]:
    """A linear or logarithmic axis over `values`; a logarithmic one has marks at `ticks`, or at 1, 2, 5."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low > 0 and high / low >= _LOG_FROM:
        return _log_axis(title, low / 1.25, high * 1.25, ticks)
    # Its ticks must not promise more values than were measured.
    marks: Mapping[str, Any] = {"tickvals": list(ticks)} if 1 <= len(ticks) <= 8 else {}
    return {"title": _title(title), "showgrid": True, **marks}


def _log_axis(
    title: str, low: float, high: float, ticks: Sequence[float] = (), *, si: bool = False
) -> dict[str, Any]:
    marks = list(ticks) or _log_ticks(low, high)
    return {
        "title": _title(title),
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": marks,
        "ticktext": [_si(mark) if si else f"{mark:g}" for mark in marks],
        "tickangle": 0,
        "showgrid": True,
        "zeroline": False,
    }


def _title(text: str) -> dict[str, Any]:
    return {"text": escape(text), "font": {"size": 13}}


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two values, with 2 and 5 between them where there are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    leading = (1, 2, 5) if last - first <= 3 else (1,)
    marks = [digit * 10.0**power for power in range(first, last + 1) for digit in leading]
    return [mark for mark in marks if low <= mark <= high]


def _si(value: float) -> str:
    """A value with the prefix of its size: 2e9 is "2 G"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {prefix}"
    return f"{value:g}"
