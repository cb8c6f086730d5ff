"""The README's plots as SVG: speed-ups with their intervals, and times beside other engines.

The same values give the same bytes: no date, fixed identifiers, text as paths (it looks the same everywhere,
whatever fonts a reader has).
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Candle", "Panel", "TimeBar", "draw_latency", "draw_speed_ups", "drawn_by", "drawn_here"]

_COLOURS = {
    "light": {"ink": "#1d232b", "soft": "#5b6673", "grid": "#dfe3e8", "accent": "#0f766e", "plain": "#9aa5b1",
              "second": "#1d4ed8"},
    "dark": {"ink": "#e6eaef", "soft": "#9aa7b4", "grid": "#303843", "accent": "#2dd4bf", "plain": "#6b7885",
             "second": "#7ab0ff"},
}  # fmt: skip
_MARKS = {
    "fastest other": ("s", "plain"),
    "fastattn fp32": ("o", "second"),
    "fastest of fastattn": ("D", "accent"),
}


@dataclass(frozen=True)
class Candle:
    """A ratio with its interval: `what` was measured of `row`, a model and task."""

    row: str
    what: str
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class TimeBar:
    """One contender's median, minimum and 90th percentile in milliseconds."""

    name: str
    median_ms: float
    min_ms: float
    high_ms: float
    ours: bool


@dataclass(frozen=True)
class Panel:
    """One model and task, fastest first."""

    title: str
    bars: tuple[TimeBar, ...]


def draw_speed_ups(candles: Sequence[Candle], theme: str) -> str:
    """An SVG of ratios against a line at 1, a line a model and task, on a logarithmic axis."""
    figure, colours = _figure(theme)
    rows = list(dict.fromkeys(candle.row for candle in candles))
    figure.set_size_inches(9, 1.1 + 0.34 * len(rows))
    axes = figure.add_subplot()
    axes.set_xscale("log")
    axes.axvline(1, color=colours["ink"], linewidth=1, linestyle=":")
    for what, (marker, colour) in _MARKS.items():
        shown = [candle for candle in candles if candle.what == what]
        if not shown:
            continue
        # Apart by a little, so that intervals do not hide one another.
        offset = 0.2 * (list(_MARKS).index(what) - 1)
        axes.errorbar(
            [candle.ratio for candle in shown],
            [rows.index(candle.row) + offset for candle in shown],
            xerr=[
                [candle.ratio - candle.low for candle in shown],
                [candle.high - candle.ratio for candle in shown],
            ],
            fmt=marker, color=colours[colour], ecolor=colours[colour], markersize=5, capsize=2.5,
            elinewidth=1.2, label=what,
        )  # fmt: skip
    low, high = min(candle.low for candle in candles), max(candle.high for candle in candles)
    low, high = min(low, 1.0) / 1.08, max(high, 1.0) * 1.08
    axes.set_xlim(low, high)
    marks = (0.1, 0.2, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
    ticks = [mark for mark in marks if low <= mark <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("times as fast as the faster untouched model (right is faster)", color=colours["soft"])
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, frameon=False, labelcolor=colours["ink"]
    )
    _style(axes, colours)
    return _svg(figure)


def draw_latency(panels: Sequence[Panel], theme: str) -> str:
    """An SVG of median times, a panel a model and task, fastest on top."""
    figure, colours = _figure(theme)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(panel.bars) for panel in panels)
    figure.set_size_inches(5.6 * columns, lines * (0.9 + 0.24 * tallest))
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, index + 1)
        bars, span = panel.bars, max(bar.high_ms for bar in panel.bars)
        axes.barh(
            range(len(bars)),
            [bar.median_ms for bar in bars],
            height=0.62,
            color=[colours["accent"] if bar.ours else colours["plain"] for bar in bars],
            xerr=[
                [bar.median_ms - bar.min_ms for bar in bars],
                [max(0.0, bar.high_ms - bar.median_ms) for bar in bars],
            ],
            error_kw={"ecolor": colours["ink"], "elinewidth": 1, "capsize": 2},
        )
        for row, bar in enumerate(bars):
            place = (max(bar.high_ms, bar.median_ms) + 0.02 * span, row)
            axes.text(*place, f"{bar.median_ms:.3g}", va="center", color=colours["ink"], fontsize=8)
        axes.set_xlim(0, 1.16 * span)
        axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.set_title(f"{panel.title}, ms", color=colours["ink"], fontsize=9.5, loc="left")
        _style(axes, colours)
    return _svg(figure)


def drawn_here() -> str:
    """The name and version of what draws here."""
    import matplotlib

    return f"Matplotlib {matplotlib.__version__}"


def drawn_by(svg: str) -> str:
    """The name and version of what drew a plot."""
    found = re.search(r"Matplotlib v([\w.]+)", svg)
    return f"Matplotlib {found.group(1)}" if found else "something else"


def _figure(theme: str) -> tuple[Figure, dict[str, str]]:
    # Made without pyplot: no window system, no state shared with a caller's plots.
    from matplotlib.figure import Figure

    return Figure(layout="constrained"), _COLOURS[theme]


def _style(axes: Axes, colours: dict[str, str]) -> None:
    axes.grid(axis="x", color=colours["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=colours["ink"], labelsize=8.5, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _svg(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    settings: dict[str, Any] = {"svg.hashsalt": "fastattn", "svg.fonttype": "path"}
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    # matplotlib leaves blanks at the ends of lines.
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
