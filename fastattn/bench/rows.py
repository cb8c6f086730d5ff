"""One contender's times, parity and ratios: a row of every table, and when a ratio may be shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from typing import Any, Literal

from fastattn.bench.parity import Parity
from fastattn.bench.ratio import MINIMUM_ROUNDS, Ratio, paired_ratio

__all__ = ["Row", "with_ratios"]


@dataclass(frozen=True)
class Row:
    """What was measured of one contender. Times are milliseconds a call, one entry a round.

    Attributes:
        status: "measured", "missing" (not on this machine), "failed" (raised) or "wrong" (parity failed: not
            timed).
        reason: why it was not measured, or has no ratio.
        wall_ms, cpu_ms: wall time, and processor time over all threads of the process.
        device_ms: time between two events on the GPU, empty elsewhere.
        first_call_ms: the first call, with whatever it compiles.
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

    @property
    def min_ms(self) -> float | None:
        """The fastest round."""
        return min(self.wall_ms, default=None)

    @property
    def median_ms(self) -> float | None:
        """The middle round."""
        return statistics.median(self.wall_ms) if self.wall_ms else None

    @property
    def high_ms(self) -> float | None:
        """The 90th percentile, by the nearest rank."""
        return sorted(self.wall_ms)[round(0.9 * (len(self.wall_ms) - 1))] if self.wall_ms else None

    @property
    def cpu_median_ms(self) -> float | None:
        """The middle round's processor time: above the wall time where several threads work."""
        return statistics.median(self.cpu_ms) if self.cpu_ms else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, samples included."""
        summary = {"min_ms": self.min_ms, "median_ms": self.median_ms, "high_ms": self.high_ms}
        figures = {
            name: each.to_dict() if (each := getattr(self, name)) else None
            for name in ("parity", "ratio", "against_ratio")
        }
        samples = {name: list(getattr(self, name)) for name in ("wall_ms", "cpu_ms", "device_ms")}
        plain = {
            name: getattr(self, name)
            for name in ("name", "dtype", "status", "reason", "baseline", "highlight", "first_call_ms")
        }
        summary |= {"cpu_median_ms": self.cpu_median_ms}
        return {**plain, "calls_per_round": self.calls_per_round, **summary, **figures, **samples}


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
