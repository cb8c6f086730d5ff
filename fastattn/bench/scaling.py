"""Time and memory against length, batch and fill, with a curve fitted through each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

import numpy as np

from fastattn.bench.contender import describe
from fastattn.bench.rows import Row
from fastattn.bench.workloads import Workload

__all__ = ["INTERRUPTED", "Axis", "Curve", "Fit", "Scaling", "ScalingPoint", "fit", "scaling"]

Axis = Literal["length", "batch", "fill"]
# The reason of points that Ctrl-C left out.
INTERRUPTED = "interrupted"
_FIELDS = {"length": "seq", "batch": "batch", "fill": "fill"}
# Attention adds a square to what every token costs; sequences and filled positions cost the same each.
_DEGREES = {"length": 2, "batch": 1, "fill": 1}


@dataclass(frozen=True)
class ScalingPoint:
    """One value of the axis.

    Attributes:
        value: tokens, sequences, or a fraction filled.
        median_ms: of a call; None where it was not measured.
        low_ms, high_ms: 10th and 90th percentile of the rounds.
        peak_bytes: what the contender adds at its peak, on the device where that is told, else on the host;
            None where neither is.
        reason: why it was not measured ("out of memory: ...", "interrupted"); empty where it was.
    """

    value: float
    median_ms: float | None
    low_ms: float | None
    high_ms: float | None
    peak_bytes: int | None
    reason: str = ""


@dataclass(frozen=True)
class Fit:
    """A curve through points.

    Attributes:
        formula: such as "a + b n + c n^2".
        coefficients: by name, none negative; milliseconds or bytes a power of n.
        r2: share of the variance of the relative errors it explains; None where there are no more points than
            terms, which says nothing.
        exponent: slope of log y over log n through the upper half of the points: what a power law would have
            there.
    """

    formula: str
    coefficients: dict[str, float]
    r2: float | None
    exponent: float | None

    def at(self, n: float) -> float:
        """The fitted value at n, in milliseconds or bytes."""
        return sum(value * n**power for power, value in enumerate(self.coefficients.values()))


@dataclass(frozen=True)
class Curve:
    """One contender along the axis.

    Attributes:
        contender: the name of its rows.
        points: one a value, in the order measured.
        time_fit, memory_fit: None with fewer than two points.
    """

    contender: str
    points: tuple[ScalingPoint, ...]
    time_fit: Fit | None
    memory_fit: Fit | None


@dataclass(frozen=True)
class Scaling:
    """All contenders along one axis.

    Attributes:
        axis: what changes.
        fixed: what does not: "batch", "length", "fill", without the axis.
        curves: one a contender.
    """

    axis: Axis
    fixed: dict[str, float]
    curves: tuple[Curve, ...]

    @property
    def interrupted(self) -> bool:
        """Whether Ctrl-C left points out."""
        return any(point.reason == INTERRUPTED for curve in self.curves for point in curve.points)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "interrupted": self.interrupted}


def scaling(
    axis: str,
    values: Sequence[float],
    measure_one: Callable[[Workload], Sequence[Row]],
    base: Workload,
) -> Scaling:
    """Measure a workload with one of its numbers changed, and fit how time and memory grow.

    Args:
        axis: "length", "batch" or "fill".
        values: of the axis; positive, distinct, integers but for fill. Measured in this order: ascending
            keeps the most where memory or patience runs out.
        measure_one: rows of one workload. An error it raises, out of memory included, is the reason of that
            point, and the rest goes on; on Ctrl-C the points so far are kept and the others are
        "interrupted". base: the rest of the workload.

    Raises:
        ValueError: another axis, or values that are missing, repeated or not a workload's.
    """
    if axis not in get_args(Axis):
        raise ValueError(f"axis is {axis!r}; it must be one of {', '.join(get_args(Axis))}")
    if not values or len(set(values)) != len(values):
        raise ValueError(f"values are {list(values)}; there must be one or more, each once")
    changes: list[dict[str, Any]] = [{_FIELDS[axis]: value} for value in values]
    workloads = [replace(base, **change) for change in changes]

    found: list[dict[str, ScalingPoint]] = []
    reasons: list[str] = []
    for value, workload in zip(values, workloads, strict=True):
        points: dict[str, ScalingPoint] = {}
        reason = "not among the contenders here"
        try:
            points = {row.name: _point(value, row) for row in measure_one(workload)}
        except KeyboardInterrupt:
            break
        except Exception as error:
            reason = describe(error)
        found.append(points)
        reasons.append(reason)
    left = len(values) - len(found)
    found += [{}] * left
    reasons += [INTERRUPTED] * left

    names = list(dict.fromkeys(name for points in found for name in points))
    curves = []
    for name in names:
        line = [
            points.get(name) or ScalingPoint(value, None, None, None, None, reason)
            for value, points, reason in zip(values, found, reasons, strict=True)
        ]
        times = [(point.value, point.median_ms) for point in line if point.median_ms]
        memory = [(point.value, point.peak_bytes) for point in line if point.peak_bytes]
        degree = _DEGREES[axis]
        curves.append(Curve(name, tuple(line), fit(times, degree), fit(memory, degree)))
    every = {"batch": base.batch, "length": base.seq, "fill": base.fill}
    return Scaling(
        cast(Axis, axis), {name: value for name, value in every.items() if name != axis}, tuple(curves)
    )


def fit(points: Sequence[tuple[float, float]], degree: int) -> Fit | None:
    """The polynomial without negative coefficients that is nearest to points (n, y) in relative error.

    Relative, because a time of 1 ms matters as much as one of 1 s and is measured as well; not negative,
    because neither a token nor a pair of them gives time back. With so few terms the best set of those above
    0 is found by trying all (non-negative least squares: Lawson and Hanson, "Solving Least Squares
    Problems", 1974, chapter 23).

    Args:
        points: n and y above 0.
        degree: of the polynomial; lower where there are too few points.

    Returns:
        None with fewer than two points.

    Example:
        >>> fit([(1, 3.0), (2, 5.0), (3, 7.0)], 1).coefficients
        {'a': 1.0, 'b': 2.0}
    """
    if len(points) < 2:
        return None
    n, y = (np.array(each, dtype=np.float64) for each in zip(*points, strict=True))
    terms = min(degree + 1, len(points))
    # Scaled to n <= 1: powers of thousands of tokens would lose digits.
    powers = np.arange(terms)
    matrix = (n / n.max())[:, None] ** powers / y[:, None]
    solution, residual = np.zeros(terms), math.inf
    for size in range(1, terms + 1):
        for kept in itertools.combinations(range(terms), size):
            candidate = np.zeros(terms)
            candidate[list(kept)] = np.linalg.lstsq(matrix[:, kept], np.ones(len(y)), rcond=None)[0]
            error = float(((matrix @ candidate - 1) ** 2).sum())
            if candidate.min() >= 0 and error < residual:
                solution, residual = candidate, error
    # Against the best constant, in the same measure.
    constant = matrix[:, 0]
    spread = float(((constant * (constant.sum() / (constant @ constant)) - 1) ** 2).sum())
    r2 = 1 - residual / spread if spread > 0 and len(points) > terms else None
    names = "abc"[:terms]
    formula = " + ".join(("a", "b n", "c n^2")[:terms])
    values = [float(f"{value:.12g}") for value in solution / n.max() ** powers]
    upper = np.argsort(n)[-max(2, (len(n) + 1) // 2) :]
    exponent = float(np.polyfit(np.log(n[upper]), np.log(y[upper]), 1)[0])
    return Fit(formula, dict(zip(names, values, strict=True)), r2, exponent)


def _point(value: float, row: Row) -> ScalingPoint:
    peak = row.peak_host_bytes if row.peak_device_bytes is None else row.peak_device_bytes
    if row.status != "measured" or not row.wall_ms:
        reason = row.reason or (INTERRUPTED if row.status == "measured" else row.status)
        return ScalingPoint(value, None, None, None, None, reason)
    low, high = np.quantile(row.wall_ms, [0.1, 0.9])
    return ScalingPoint(value, row.median_ms, float(low), float(high), peak)
