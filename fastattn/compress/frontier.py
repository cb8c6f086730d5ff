"""The accuracy, size and speed of several compressions of one model, and which of them are worth having."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from fastattn.bench.files import write_text
from fastattn.report import format_table

__all__ = ["SCHEMA", "UNTOUCHED", "SweepPoint", "SweepResult", "pareto"]

SCHEMA = "fastattn.sweep/1"
UNTOUCHED = "untouched"


@dataclass(frozen=True)
class SweepPoint:
    """One compression, measured.

    Attributes:
        name: unique in its sweep; "untouched" is the model as it was given.
        options: what was asked for: "prune", "recover", "quantize", "optimize", "export".
        status: "measured", "failed" (it raised: `reason`), or "not reached" (the budget ended before it).
        score: what `evaluate` gave, the first figure where it gave several.
        figures: all of them by name.
        model_bytes: of the parameters and buffers it holds, shared ones counted once; of an export those of
            its graphs and their weights on the disk.
        latency_ms: the median of the batch.
        speed_up: the untouched model's time over this one's, both of the same rounds: the median.
        speed_up_low, speed_up_high: its 95% interval.
        pareto: whether no other point is as good in score, size and speed, and better in one.
        folder: where the compressed model was saved or exported, relative to the sweep's folder; None where
            it was not.
        notes: what pruning, recovery and quantization reported.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    status: Literal["measured", "failed", "not reached"] = "measured"
    reason: str = ""
    score: float | None = None
    figures: dict[str, float] = field(default_factory=dict)
    model_bytes: int | None = None
    latency_ms: float | None = None
    speed_up: float | None = None
    speed_up_low: float | None = None
    speed_up_high: float | None = None
    pareto: bool = False
    folder: str | None = None
    notes: tuple[str, ...] = ()


def pareto(points: Sequence[SweepPoint], *, higher_is_better: bool = True) -> list[SweepPoint]:
    """The points with `pareto` set where no other is at least as good in all of score, size and speed-up and
    better in one. Points without figures are never on the frontier, nor push another off it.

    Example:
        >>> good = SweepPoint("good", score=0.9, model_bytes=10, speed_up=2.0)
        >>> bad = SweepPoint("bad", score=0.8, model_bytes=10, speed_up=2.0)
        >>> [point.name for point in pareto([good, bad]) if point.pareto]
        ['good']
    """
    goods = [_goods(point, higher_is_better) for point in points]

    def dominated(mine: tuple[float, ...]) -> bool:
        return any(
            other is not None and other != mine and all(a >= b for a, b in zip(other, mine, strict=True))
            for other in goods
        )

    return [
        replace(point, pareto=mine is not None and not dominated(mine))
        for point, mine in zip(points, goods, strict=True)
    ]


def _goods(point: SweepPoint, higher_is_better: bool) -> tuple[float, float, float] | None:
    """Score, size and speed, the more the better; None where one is missing or no number."""
    if point.status != "measured" or None in (point.score, point.model_bytes, point.speed_up):
        return None
    assert point.score is not None and point.model_bytes is not None and point.speed_up is not None
    if point.score != point.score:
        return None
    return (point.score if higher_is_better else -point.score), -float(point.model_bytes), point.speed_up


@dataclass(frozen=True)
class SweepResult:
    """All points of a sweep, the untouched model's first.

    Attributes:
        points: in the order they were asked for.
        model: the name of the model's class.
        metric: the name of the score; higher_is_better: what it means.
        workload: what was timed, in words.
        environment: as `fastattn.bench.capture_environment` gives it.
    """

    points: tuple[SweepPoint, ...]
    model: str
    metric: str = "score"
    higher_is_better: bool = True
    workload: str = ""
    environment: dict[str, Any] = field(default_factory=dict)

    @property
    def untouched(self) -> SweepPoint:
        """The model as it was given."""
        return self.points[0]

    @property
    def frontier(self) -> tuple[SweepPoint, ...]:
        """The points on the frontier, the slowest first."""
        return tuple(
            sorted((each for each in self.points if each.pareto), key=lambda each: each.speed_up or 0)
        )

    def table(self) -> str:
        """A line a point, "*" where it is on the frontier; then why points failed, and what they noted."""
        rows = [
            (
                "*" if point.pareto else "",
                point.name,
                number(point.score),
                "-" if point.model_bytes is None else f"{point.model_bytes / 1e6:.2f}",
                "-" if point.latency_ms is None else f"{point.latency_ms:.2f}",
                speed_text(point),
            )
            for point in self.points
        ]
        parts = [format_table(("", "point", self.metric, "MB", "ms", "faster"), rows)]
        parts.append(
            f"* no other point is as good in {self.metric} ({'more' if self.higher_is_better else 'less'} is "
            f"better), size and speed, and better in one. Times: {self.workload}, in the same rounds as the "
            "untouched model."
        )
        parts += [f"{point.name}: {point.status}: {point.reason}" for point in self.points if point.reason]
        parts += [f"note: {point.name}: {note}" for point in self.points for note in point.notes]
        return "\n\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("model", "metric", "higher_is_better", "workload")}
        points = [{**asdict(point), "notes": list(point.notes)} for point in self.points]
        return {"schema": SCHEMA, **values, "points": points, "environment": self.environment}

    def write_json(self, path: str | Path) -> Path:
        """Write `to_dict` to `path`.

        Raises:
            OSError: `path` cannot be written.
        """
        return write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")

    def write_html(self, path: str | Path) -> Path:
        """Write one self-contained page with the frontier as a plot.

        Raises:
            ImportError: plotly is missing.
            OSError: `path` cannot be written.
        """
        from fastattn.compress.sweep_page import sweep_page

        return sweep_page(self).write(path)


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def speed_text(point: SweepPoint) -> str:
    return "-" if point.speed_up is None else f"{point.speed_up:.2f}x"
