"""Plots of one row a contender: times, ratios, grouped or stacked bars, and the waterfall of an attribution.

A figure is plotly's JSON with colours as roles ("accent", "plain", "ink", "s0" to "s7"): the page's script
puts in those of the light or dark theme. A row's name stands above its bar, not beside it: a long one would
leave no room for the bars on a narrow screen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = [
    "SERIES_COLOURS",
    "Bar",
    "BarsPlot",
    "Fall",
    "Point",
    "RatioPlot",
    "TimePlot",
    "Waterfall",
    "number",
    "shortened",
]

# How many colours the page has for series: "s0" and on.
SERIES_COLOURS = 8
# A row of a plot, in pixels: its name, then its bar. Positions are in rows: the name's and the bar's middle.
_NAME_PX, _BAR_PX, _FRAME_PX = 23, 23, 62
_NAME_AT, _BAR_AT, _BAR_WIDTH = -0.27, 0.14, 0.44
# What fits a line of a screen 400 px wide.
_NAME_LENGTH = 46
# And beside a text of twenty.
_FALL_LENGTH = 30


@dataclass(frozen=True)
class Bar:
    """One contender's time: the bar is the median, the whisker runs from `low` (the minimum) to `high`."""

    label: str
    median: float
    low: float
    high: float
    highlight: bool = False


@dataclass(frozen=True)
class TimePlot:
    """Horizontal bars of times with whiskers, first bar on top; `unit` labels the axis."""

    heading: str
    bars: Sequence[Bar]
    unit: str = "ms"
    note: str = ""

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        bars = list(self.bars)
        names = [bar.label for bar in bars]
        hover = [
            f"{escape(bar.label)}<br>median {number(bar.median)} {escape(self.unit)}"
            f"<br>minimum {number(bar.low)}, high {number(bar.high)}"
            for bar in bars
        ]
        trace = {
            "type": "bar",
            "orientation": "h",
            "y": _positions(len(bars)),
            "width": _BAR_WIDTH,
            "x": [bar.median for bar in bars],
            "marker": {"color": ["accent" if bar.highlight else "plain" for bar in bars]},
            "error_x": _whiskers([(bar.low, bar.median, bar.high) for bar in bars]),
            **_hover(hover),
        }
        beside = _text_beside(
            _positions(len(bars)),
            [bar.high for bar in bars],
            [f"{number(bar.median)} {self.unit}" for bar in bars],
        )
        span = max((bar.high for bar in bars), default=1.0)
        return _figure(names, [trace, beside], _axis(self.unit, span))


@dataclass(frozen=True)
class Point:
    """One contender's ratio with its confidence interval [low, high]; above 1 is faster than the baseline."""

    label: str
    ratio: float
    low: float
    high: float
    highlight: bool = False


@dataclass(frozen=True)
class RatioPlot:
    """Ratios with their confidence intervals against a line at 1, first point on top."""

    heading: str
    points: Sequence[Point]
    note: str = ""

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        points = list(self.points)
        hover = [
            f"{escape(point.label)}<br>{point.ratio:.2f}x ({point.low:.2f} to {point.high:.2f})"
            for point in points
        ]
        trace = {
            "type": "scatter",
            "mode": "markers",
            "y": _positions(len(points)),
            "x": [point.ratio for point in points],
            "marker": {"size": 9, "color": ["accent" if point.highlight else "plain" for point in points]},
            "error_x": _whiskers([(point.low, point.ratio, point.high) for point in points]),
            **_hover(hover),
        }
        beside = _text_beside(
            _positions(len(points)),
            [point.high for point in points],
            [f"{point.ratio:.2f}x" for point in points],
        )
        low = min([point.low for point in points] + [1.0])
        high = max([point.high for point in points] + [1.0])
        margin = 0.08 * (high - low) + 0.02
        axis = {
            "title": {"text": "times as fast (right is faster)", "font": {"size": 13}},
            "range": [low - margin, high + margin + 0.2 * (high - low + 0.1)],
        }
        line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
                "line": {"color": "ink", "width": 1.2, "dash": "dot"}}  # fmt: skip
        return _figure([point.label for point in points], [trace, beside], axis, shapes=[line])


@dataclass(frozen=True)
class BarsPlot:
    """Several quantities of each row as horizontal bars, above one another or stacked into one.

    Attributes:
        names: one a row, first on top.
        series: values of every row by what they are; None where a row has none.
        highlights: names of rows whose bars stand out, where there is one series.
    """

    heading: str
    names: Sequence[str]
    series: Mapping[str, Sequence[float | None]]
    unit: str = "ms"
    stacked: bool = False
    highlights: Sequence[str] = ()
    note: str = ""

    def __post_init__(self) -> None:
        for name, values in self.series.items():
            if len(values) != len(self.names):
                raise ValueError(f"{len(values)} values of {name!r} for {len(self.names)} rows")

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        rows, series = len(self.names), list(self.series.items())
        lanes = 1 if self.stacked else max(1, len(series))
        name_px, bar_px = _NAME_PX, _BAR_PX if lanes == 1 else 17 * lanes
        # The same pixels for a name, whatever the number of bars below it.
        share = bar_px / (name_px + bar_px)
        traces: list[dict[str, Any]] = []
        for index, (what, values) in enumerate(series):
            lane = 0 if self.stacked else index
            middle = 0.5 - share + share * (lane + 0.5) / lanes
            positions = [row + middle - (0.05 if lanes == 1 else 0.03) for row in range(rows)]
            texts = ["-" if value is None else f"{number(value)} {self.unit}" for value in values]
            hover = [
                f"{escape(name)}<br>{escape(what)}: {escape(text)}"
                for name, text in zip(self.names, texts, strict=True)
            ]
            traces.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": escape(what),
                    "legendgroup": str(index),
                    "showlegend": True,
                    "y": positions,
                    "x": list(values),
                    "width": 0.86 * share / lanes,
                    "marker": {"color": self._colours(f"s{index % SERIES_COLOURS}")},
                    **_hover(hover),
                }
            )
            if not self.stacked:
                beside = _text_beside(positions, [value or 0.0 for value in values], texts)
                traces.append({**beside, "legendgroup": str(index)})
        totals = [sum(values[row] or 0.0 for _, values in series) for row in range(rows)]
        if self.stacked:
            texts = [f"{number(total)} {self.unit}" for total in totals]
            traces.append(_text_beside([row + 0.5 - share / 2 - 0.05 for row in range(rows)], totals, texts))
        largest = max((value or 0.0 for _, values in series for value in values), default=0.0)
        span = max(totals, default=0.0) if self.stacked else largest
        figure = _figure(
            self.names, traces, _axis(self.unit, span), row_px=name_px + bar_px, name_at=share / -2
        )
        figure["layout"]["barmode"] = "stack" if self.stacked else "overlay"
        return figure

    def _colours(self, series: str) -> str | list[str]:
        if len(self.series) > 1:
            return series
        return ["accent" if name in self.highlights else "plain" for name in self.names]


@dataclass(frozen=True)
class Fall:
    """A step of a waterfall: from `before` to `after`, which lies between `low` and `high`.

    One without `before` is a whole bar from zero. `text` is short: about twenty characters.
    """

    label: str
    before: float | None
    after: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Waterfall:
    """Bars that each start where the one above ended; the first and the last are whole."""

    heading: str
    falls: Sequence[Fall]
    unit: str = "ms"
    note: str = ""

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        falls = list(self.falls)
        positions = _positions(len(falls))
        starts = [0.0 if fall.before is None else min(fall.before, fall.after) for fall in falls]
        lengths = [fall.after if fall.before is None else abs(fall.after - fall.before) for fall in falls]
        hover = [f"{escape(fall.label)}<br>{escape(fall.text)}" for fall in falls]
        bars = {
            "type": "bar",
            "orientation": "h",
            "y": positions,
            "width": _BAR_WIDTH,
            "base": starts,
            "x": lengths,
            "marker": {"color": [_fall_colour(fall) for fall in falls]},
            **_hover(hover),
        }
        ends = {
            "type": "scatter",
            "mode": "markers",
            "y": positions,
            "x": [fall.after for fall in falls],
            "marker": {"size": 1, "color": "ink"},
            "error_x": _whiskers([(fall.low, fall.after, fall.high) for fall in falls]),
            "hoverinfo": "skip",
        }
        span = max((max(fall.before or 0.0, fall.high) for fall in falls), default=1.0)
        names = [shortened(fall.label, _FALL_LENGTH) for fall in falls]
        figure = _figure(names, [bars, ends], _axis(self.unit, span, room=1.05))
        # Bars reach anywhere: what a step gives stands at the end of its name's line.
        figure["layout"]["annotations"] += [
            _annotation(row + _NAME_AT, fall.text, 1.0) for row, fall in enumerate(falls)
        ]
        return figure


def _fall_colour(fall: Fall) -> str:
    if fall.before is None:
        return "plain"
    return "accent" if fall.after <= fall.before else "bad"


def shortened(text: str, length: int = _NAME_LENGTH) -> str:
    """`text` in at most `length` characters, its middle left out: both ends of a name tell it apart."""
    if len(text) <= length:
        return text
    head = (length - 1) * 2 // 3
    return f"{text[:head].rstrip()}…{text[head - length + 1 :].lstrip()}"


def number(value: float) -> str:
    """Four digits, and all that are before the point: 12.35 and 12,346."""
    return f"{value:.4g}" if abs(value) < 9999.5 else f"{value:,.0f}"


def _positions(rows: int) -> list[float]:
    return [row + _BAR_AT for row in range(rows)]


def _axis(unit: str, span: float, room: float = 1.4) -> dict[str, Any]:
    """A value axis from zero, with room for the text at the bars' ends."""
    # A plot of nothing but zeros still needs an axis.
    return {"title": {"text": escape(unit), "font": {"size": 13}}, "range": [0, (span or 1.0) * room]}


def _figure(
    names: Sequence[str],
    traces: list[dict[str, Any]],
    axis: dict[str, Any],
    *,
    row_px: int = _NAME_PX + _BAR_PX,
    name_at: float = _NAME_AT,
    shapes: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    rows = len(names)
    return {
        "height": _FRAME_PX + row_px * rows,
        "data": traces,
        "layout": {
            "xaxis": axis,
            "yaxis": {
                "range": [rows - 0.5, -0.5],
                "showticklabels": False,
                "showgrid": False,
                "zeroline": False,
            },
            "annotations": [
                _annotation(row + name_at, shortened(name), 0.0) for row, name in enumerate(names)
            ],
            "shapes": list(shapes),
        },
    }


def _annotation(at: float, text: str, x: float) -> dict[str, Any]:
    # On the page's colour, so that no line runs through it.
    return {
        "xref": "paper",
        "x": x,
        "xanchor": "left" if x == 0.0 else "right",
        "y": at,
        "text": escape(text),
        "showarrow": False,
        "font": {"color": "ink", "size": 13},
        "bgcolor": "page",
        "borderpad": 0,
    }


def _hover(texts: list[str]) -> dict[str, Any]:
    return {"hovertext": texts, "hovertemplate": "%{hovertext}<extra></extra>"}


def _whiskers(bounds: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Error bars from (low, value, high)."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [high - value for _, value, high in bounds],
        "arrayminus": [value - low for low, value, _ in bounds],
        "color": "ink",
        "thickness": 1.3,
        "width": 5,
    }


def _text_beside(y: Sequence[float], x: Sequence[float], texts: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "text",
        "y": list(y),
        "x": list(x),
        "text": [f"  {escape(each)}" for each in texts],
        "textposition": "middle right",
        "textfont": {"color": "ink"},
        "hoverinfo": "skip",
        "cliponaxis": False,
    }
