"""One contender's times, parity and ratios: a row of every table, and when a ratio may be shown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fastattn.bench.parity import Parity
from fastattn.bench.ratio import MINIMUM_ROUNDS, Ratio, paired_ratio

__all__ = ["PERCENTILES", "Row", "Stopped", "outliers", "percentiles", "with_ratios"]

PERCENTILES = (50, 90, 99)

# Why rounds ended: ratios known as well as asked for, time was up, as many as allowed, Ctrl-C.
Stopped = Literal["", "precision", "budget", "rounds", "interrupted"]

# A modified z-score above 3.5 (B. Iglewicz and D. Hoaglin, "How to Detect and Handle Outliers", 1993); 1.4826
# makes the median absolute deviation a standard deviation where times are normal.
_OUTLIER_DEVIATIONS = 3.5 * 1.4826


def percentiles(values: Sequence[float]) -> dict[int, float]:
    """The 50th, 90th and 99th percentile: the median, and the smallest value that 90 or 99% do not exceed
    (nearest rank, so a time that was measured; of fewer than 100 values the 99th is the largest).

    Example:
        >>> percentiles([1.0, 2.0, 3.0, 10.0])
        {50: 2.5, 90: 10.0, 99: 10.0}
    """
    if not values:
        return {}
    ordered = sorted(values)
    ranked = {level: ordered[math.ceil(level * len(ordered) / 100) - 1] for level in PERCENTILES}
    return ranked | {50: statistics.median(ordered)}


def outliers(values: Sequence[float]) -> int:
    """How many values lie further from the median than 3.5 times 1.4826 median absolute deviations. They are
    counted, never left out: ratios are medians, which they hardly move.

    Example:
        >>> outliers([1.0, 1.1, 0.9, 1.0, 1.2, 5.0])
        1
    """
    if not values:
        return 0
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    # Times that all agree to the last digits have no outliers for differing in them.
    limit = max(_OUTLIER_DEVIATIONS * deviation, 1e-9 * abs(middle))
    return sum(abs(value - middle) > limit for value in values)


@dataclass(frozen=True)
class Row:
    """What was measured of one contender. Times are milliseconds a call, one entry a round.

    Attributes:
        status: "measured", "missing" (not on this machine), "failed" (raised) or "wrong" (parity failed: not
            timed).
        reason: why it was not measured, or has no ratio.
        stopped: why there are as many rounds as there are.
        wall_ms, cpu_ms: wall time, and processor time over all threads of the process.
        device_ms: time between two events on the GPU, empty elsewhere.
        stages_ms: what was done once before the first call, in order: "export", "compile", "load".
        versions: of the packages that run it, where its environment is not this process'.
        first_call_ms: the first call, with whatever it compiles.
        parts_ms: named parts of a call, such as "first_token_ms" and "inter_token_ms", of all rounds.
        peak_host_bytes, peak_device_bytes: what the contender adds at its peak: weights, arenas and working
            memory; None where it cannot be told.
        energy_j: joules a call, None where the device does not count them.
        parity: None where no check was given or the contender did not run.
        ratio: baseline time over its time; None without parity, and for the baseline itself.
        against_ratio: the same over `Contender.against`.
        baseline: whether it is the baseline the ratios are measured against.
    """

    name: str
    dtype: str
    status: Literal["measured", "missing", "failed", "wrong"]
    reason: str = ""
    wall_ms: tuple[float, ...] = ()
    cpu_ms: tuple[float, ...] = ()
    device_ms: tuple[float, ...] = ()
    first_call_ms: float | None = None
    calls_per_round: int = 1
    parity: Parity | None = None
    ratio: Ratio | None = None
    against_ratio: Ratio | None = None
    baseline: bool = False
    highlight: bool = False
    stages_ms: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    parts_ms: dict[str, tuple[float, ...]] = field(default_factory=dict)
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    energy_j: float | None = None
    stopped: Stopped = ""

    @property
    def min_ms(self) -> float | None:
        """The fastest round."""
        return min(self.wall_ms, default=None)

    @property
    def median_ms(self) -> float | None:
        """The middle round."""
        return statistics.median(self.wall_ms) if self.wall_ms else None

    @property
    def p50_ms(self) -> float | None:
        """The middle round, by `percentiles`."""
        return percentiles(self.wall_ms).get(50)

    @property
    def p90_ms(self) -> float | None:
        """What 90% of the rounds do not exceed."""
        return percentiles(self.wall_ms).get(90)

    @property
    def p99_ms(self) -> float | None:
        """What 99% of the rounds do not exceed: with fewer than 100, the slowest."""
        return percentiles(self.wall_ms).get(99)

    @property
    def outliers(self) -> int:
        """How many rounds were far off the others, by `outliers`."""
        return outliers(self.wall_ms)

    @property
    def cpu_median_ms(self) -> float | None:
        """The middle round's processor time: above the wall time where several threads work."""
        return statistics.median(self.cpu_ms) if self.cpu_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, samples included; "parts" has the percentiles and outliers of "parts_ms"."""
        plain = {
            name: getattr(self, name)
            for name in (
                "name", "dtype", "status", "reason", "stopped", "baseline", "highlight", "first_call_ms",
                "calls_per_round", "min_ms", "median_ms", "p50_ms", "p90_ms", "p99_ms", "outliers",
                "cpu_median_ms", "peak_host_bytes", "peak_device_bytes", "energy_j",
            )
        }  # fmt: skip
        figures = {
            name: each.to_dict() if (each := getattr(self, name)) else None
            for name in ("parity", "ratio", "against_ratio")
        }
        parts = {
            name: {f"p{level}": value for level, value in percentiles(values).items()}
            | {"outliers": outliers(values)}
            for name, values in self.parts_ms.items()
        }
        samples: dict[str, Any] = {
            name: list(getattr(self, name)) for name in ("wall_ms", "cpu_ms", "device_ms")
        }
        samples["parts_ms"] = {name: list(values) for name, values in self.parts_ms.items()}
        return {
            **plain,
            **figures,
            "stages_ms": dict(self.stages_ms),
            "versions": dict(self.versions),
            "parts": parts,
            **samples,
        }


def with_ratios(row: Row, baseline: Row | None, against: Row | None) -> Row:
    """The row with its ratio over the baseline and over `against`, or with the reason why there is none."""
    if row.status != "measured":
        return row
    reason = _no_ratio(row, baseline)
    if baseline is None or row.name == baseline.name:
        return replace(row, reason=reason, baseline=baseline is not None)
    row = replace(row, reason=reason, ratio=None if reason else _ratio(baseline, row))
    if against is not None and against.name != row.name and not _no_ratio(row, against):
        row = replace(row, against_ratio=_ratio(against, row))
    return row


def _no_ratio(row: Row, baseline: Row | None) -> str:
    """Why no ratio of `row` over `baseline` may be shown; empty where it may."""
    if baseline is None or not baseline.wall_ms:
        return "no ratio: the baseline was not measured"
    if row.parity is None or baseline.parity is None:
        return "no ratio: parity was not checked"
    if len(row.wall_ms) < MINIMUM_ROUNDS:
        return f"no ratio: an interval takes {MINIMUM_ROUNDS} rounds"
    return ""


def _ratio(baseline: Row, row: Row) -> Ratio | None:
    return paired_ratio(baseline.wall_ms, row.wall_ms, baseline.name)
