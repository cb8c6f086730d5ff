"""A plot of numbered points with two axes: what is gained against what it costs, the best joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

__all__ = ["Spot", "SpotPlot"]

_HEIGHT_PX = 460
# A marker holds its number, and the more of the rest the larger its point: names would run into one another.
_NARROWEST_PX, _REST_PX = 17, 19
# Of the span of the values, left free around them.
_MARGIN = 0.12


@dataclass(frozen=True)
class Spot:
    """One point: its number in the table beside the plot, where it is, how large, what is said on hovering.

    Attributes:
        low, high: of x, the ends of a whisker.
        size: of the marker, relative to the largest.
        best: whether it is coloured; joined: whether the line runs through it.
    """

    number: int
    label: str
    x: float
    y: float
    low: float
    high: float
    size: float
    best: bool = False
    joined: bool = False
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class SpotPlot:
    """Points with whiskers along x, their size a third quantity; the best ones coloured and joined.

    Attributes:
        x_title, y_title: what the axes show, with the unit.
    """

    heading: str
    spots: Sequence[Spot]
    x_title: str
    y_title: str
    note: str = ""

    def figure(self) -> dict[str, Any]:
        """Plotly's JSON."""
        largest = max((spot.size for spot in self.spots), default=1.0) or 1.0
        joined = sorted((spot for spot in self.spots if spot.joined), key=lambda spot: spot.x)
        traces: list[dict[str, Any]] = [
            {
                "type": "scatter",
                "mode": "lines",
                "x": [spot.x for spot in joined],
                "y": [spot.y for spot in joined],
                "line": {"color": "accent", "width": 1.4, "dash": "dot"},
                "hoverinfo": "skip",
            }
        ]
        for number, name in enumerate(("other points", "on the frontier")):
            spots = [spot for spot in self.spots if spot.best == bool(number)]
            traces.append(_markers(name, spots, str(number), largest))
        across = [bound for spot in self.spots for bound in (spot.low, spot.high)]
        layout = {
            "xaxis": _axis(self.x_title, across),
            "yaxis": _axis(self.y_title, [spot.y for spot in self.spots]),
        }
        return {"height": _HEIGHT_PX, "data": traces, "layout": layout}


def _markers(name: str, spots: Sequence[Spot], group: str, largest: float) -> dict[str, Any]:
    colour = "accent" if group == "1" else "plain"
    return {
        "type": "scatter",
        "mode": "markers+text",
        "text": [str(spot.number) for spot in spots],
        "textfont": {"color": "page", "size": 11},
        "name": name,
        "legendgroup": group,
        "showlegend": True,
        "x": [spot.x for spot in spots],
        "y": [spot.y for spot in spots],
        "marker": {
            "color": colour,
            "opacity": 0.9,
            "size": [_NARROWEST_PX + _REST_PX * (spot.size / largest) ** 0.5 for spot in spots],
            "line": {"color": "page", "width": 1},
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [spot.high - spot.x for spot in spots],
            "arrayminus": [spot.x - spot.low for spot in spots],
            "color": colour,
            "thickness": 1.2,
            "width": 4,
        },
        "hovertext": [
            "<br>".join(map(escape, (f"{spot.number}. {spot.label}", *spot.notes))) for spot in spots
        ],
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = _MARGIN * (high - low) or abs(high) * _MARGIN or 1.0
    return {
        "title": {"text": escape(title), "font": {"size": 13}},
        "range": [low - margin, high + margin],
        "showgrid": True,
        "zeroline": False,
    }
