"""Two runs beside each other: which rows became slower, and how sure that is.

Rows are matched by model, workload and contender. Time and speed-up over the baseline are compared apart: a
machine that is slower today changes the first and hardly the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np

from fastattn.bench.ratio import LEVEL, MINIMUM_ROUNDS
from fastattn.bench.runs import Key, Quantity, Run, RunRow
from fastattn.bench.tables import escaped, markdown_table
from fastattn.report import format_table

__all__ = ["METRICS", "Change", "Comparison", "Metric", "RowChange", "compare_runs"]

Metric = Literal["auto", "time", "speed-up"]
METRICS: tuple[Metric, ...] = get_args(Metric)
SCHEMA = "fastattn.comparison/1"
_RESAMPLES = 4000
_FAILING = ("slower", "broken")


@dataclass(frozen=True)
class Change:
    """A quantity in both runs.

    Attributes:
        old, new: milliseconds, or times as fast as the baseline.
        change: new over old, less 1.
        low, high: the ends of its 95% interval; None with under six rounds on either side. The runs are not
            paired: each is resampled by itself.
    """

    old: float
    new: float
    change: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.change:+.1%}"
        return f"{self.change:+.1%} ({self.low:+.1%} to {self.high:+.1%})"


@dataclass(frozen=True)
class RowChange:
    """One row of both runs.

    Attributes:
        verdict: "slower" (by more than the threshold, surely), "faster" (by more than it), "same" (surely
            within it), "unsure", "baseline" (what the others are judged by), "broken" (measured before, now
            failed or wrong), "mended" (the other way round), "not measured", "only old" or "only new".
        metric: what it was judged by: "time" or "speed-up"; empty where it was not.
        old_ms, new_ms: median milliseconds; None where it was not measured.
        time, speed_up: what changed; None where one run does not have it.
        reason: why it is broken, or could not be judged.
    """

    model: str
    workload: str
    contender: str
    verdict: str
    metric: str
    old_ms: float | None
    new_ms: float | None
    time: Change | None
    speed_up: Change | None
    reason: str = ""

    @property
    def failed(self) -> bool:
        """Whether it is slower or broken."""
        return self.verdict in _FAILING


@dataclass(frozen=True)
class Comparison:
    """All rows of both runs.

    Attributes:
        fail_over: a row fails when it is surely slower by more than this fraction.
        warnings: what differs between the machines, and what the files warn of themselves.
    """

    rows: tuple[RowChange, ...]
    fail_over: float
    metric: Metric
    warnings: tuple[str, ...]

    @property
    def failed(self) -> tuple[RowChange, ...]:
        """The rows that are slower or broken."""
        return tuple(row for row in self.rows if row.failed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; changes are fractions."""
        return {
            "schema": SCHEMA,
            "fail_over": self.fail_over,
            "metric": self.metric,
            "level": LEVEL,
            "failed": len(self.failed),
            "warnings": list(self.warnings),
            "rows": [{**asdict(row), "failed": row.failed} for row in self.rows],
        }

    def text(self) -> str:
        """A table a model and workload, and the verdict."""
        parts = [*(f"Warning: {warning}" for warning in self.warnings)]
        for title, columns, cells in self._tables():
            parts.append(f"{title}\n{format_table(columns, cells)}")
        return "\n\n".join([*parts, self._summary()])

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = []
        for warning in self.warnings:
            lines += [f"**Warning:** {escaped(warning)}", ""]
        for title, columns, cells in self._tables():
            lines += [f"### {escaped(title)}", "", *markdown_table(columns, cells), ""]
        return "\n".join([*lines, self._summary(), ""])

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        columns = [
            "contender",
            "old ms",
            "new ms",
            "time (95%)",
            "old x",
            "new x",
            "speed-up (95%)",
            "verdict",
        ]
        tables = []
        for (model, workload), rows in groupby(self.rows, lambda row: (row.model, row.workload)):
            cells = [_cells(row) for row in rows]
            # Not all files have a speed-up.
            used = [index for index in range(len(columns)) if any(line[index] != "-" for line in cells)]
            tables.append(
                (
                    ": ".join(part for part in (model, workload) if part),
                    [columns[index] for index in used],
                    [[line[index] for index in used] for line in cells],
                )
            )
        return tables

    def _summary(self) -> str:
        counts = {row.verdict: 0 for row in self.rows}
        for row in self.rows:
            counts[row.verdict] += 1
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        what = (
            "speed-up over the baseline where both have it, else time"
            if self.metric == "auto"
            else self.metric
        )
        return (
            f"Rows: {found}. Judged by {what}. A row fails when it is more than "
            f"{100 * self.fail_over:g}% slower at the lower end of the {LEVEL:.0%} interval, or broken."
        )


def _cells(row: RowChange) -> list[str]:
    speed = (row.speed_up.old, row.speed_up.new) if row.speed_up else (None, None)
    figures = ["-" if value is None else f"{value:.4g}" for value in (row.old_ms, row.new_ms, *speed)]
    changes = ["-" if change is None else str(change) for change in (row.time, row.speed_up)]
    return [row.contender, *figures[:2], changes[0], *figures[2:], changes[1], _verdict(row)]


def _verdict(row: RowChange) -> str:
    verdict = row.verdict.upper() if row.failed else row.verdict
    return f"{verdict}: {row.reason}" if row.reason else verdict


def compare_runs(old: Run, new: Run, fail_over: float = 0.05, metric: Metric = "auto") -> Comparison:
    """Compare the rows that both runs have, and list the others.

    A row fails when it is slower by more than `fail_over` at the lower end of the 95% interval, or when it
    was measured before and now fails or is wrong.

    Args:
        fail_over: a fraction: 0.05 is 5%. "Slower" is new time over old, or old speed-up over new, less 1.
        metric: "time", "speed-up" (over the baseline of the old run, in both), or "auto": the speed-up where
            both runs have it, else the time; the baseline itself is then not judged.

    Raises:
        ValueError: the threshold is negative or not finite, the metric is unknown, the runs come from
            different tools, or no row is in both.
    """
    if not 0 <= fail_over < float("inf"):
        raise ValueError(f"the threshold is {fail_over}; it must be a fraction of 0 or more, such as 0.05")
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}; it must be one of {', '.join(METRICS)}")
    if old.source != new.source:
        raise ValueError(f"the old run is {old.source}'s and the new one {new.source}'s: no row is in both")
    if not set(old.rows) & set(new.rows):
        raise ValueError(_nothing_matches(old, new))
    changes = {
        key: (_change(old.rows[key].time, new.rows[key].time), _speed_up(old.rows[key], new.rows[key]))
        for key in old.rows
        if key in new.rows
    }
    judged_by_speed = {(key.model, key.workload) for key, (_, speed_up) in changes.items() if speed_up}
    rows = [
        _row(
            key,
            old.rows.get(key),
            new.rows.get(key),
            *changes.get(key, (None, None)),
            fail_over=fail_over,
            metric=metric,
            has_baseline=(key.model, key.workload) in judged_by_speed,
        )
        for key in _in_order(old.rows, new.rows)
    ]
    return Comparison(tuple(rows), fail_over, metric, tuple(_warnings(old, new)))


def _in_order(old: Mapping[Key, RunRow], new: Mapping[Key, RunRow]) -> list[Key]:
    """All keys, those of one model and workload together, in the order of the old run, then of the new."""
    groups: dict[tuple[str, str], list[Key]] = {}
    for key in dict.fromkeys([*old, *new]):
        groups.setdefault((key.model, key.workload), []).append(key)
    return [key for keys in groups.values() for key in keys]


def _nothing_matches(old: Run, new: Run) -> str:
    def first(run: Run) -> str:
        key = next(iter(run.rows), None)
        return f"{key.model}, {key.workload}, {key.contender}".rstrip(", ") if key else "no row at all"

    return (
        "no row is in both runs: model, workload and contender must be the same; the old run has "
        f"{first(old)}, and the new one {first(new)}"
    )


def _change(old: Quantity | None, new: Quantity | None) -> Change | None:
    if old is None or new is None:
        return None
    before, after = old.draws(_RESAMPLES, seed=0), new.draws(_RESAMPLES, seed=1)
    low = high = None
    if before is not None and after is not None:
        low, high = map(float, np.quantile(after / before - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    return Change(old.value, new.value, new.value / old.value - 1, low, high)


def _speed_up(old: RunRow, new: RunRow) -> Change | None:
    """The change over the old run's baseline: the new run's may be another, if that one is the faster now."""
    return _change(old.speed_ups.get(old.baseline), new.speed_ups.get(old.baseline))


def _row(
    key: Key,
    old: RunRow | None,
    new: RunRow | None,
    time: Change | None,
    speed_up: Change | None,
    *,
    fail_over: float,
    metric: Metric,
    has_baseline: bool,
) -> RowChange:
    def row(verdict: str, by: str = "", reason: str = "") -> RowChange:
        old_ms, new_ms = (each.time.value if each and each.time else None for each in (old, new))
        found = (verdict, by, old_ms, new_ms, time, speed_up, reason)
        return RowChange(key.model, key.workload, key.contender, *found)

    if old is None or new is None:
        return row("only new" if old is None else "only old", reason=(new or old).reason)  # type: ignore[union-attr]
    if old.time is None or new.time is None:
        if old.time is None:
            return row("not measured" if new.time is None else "mended", reason=new.reason)
        return row("broken" if new.status in ("failed", "wrong") else "not measured", reason=new.reason)
    if metric == "auto" and speed_up is None and has_baseline and old.is_baseline:
        return row("baseline")
    by = metric if metric != "auto" else "speed-up" if speed_up else "time"
    judged = speed_up if by == "speed-up" else time
    if judged is None:
        return row("baseline") if old.is_baseline else row("unsure", by, "it has no speed-up in both")
    if judged.low is None or judged.high is None:
        return row("unsure", by, f"an interval takes {MINIMUM_ROUNDS} rounds")
    slower_low, slower_high = judged.low, judged.high
    if by == "speed-up":
        # Half the speed-up is twice as slow.
        slower_low, slower_high = 1 / (1 + judged.high) - 1, 1 / (1 + judged.low) - 1
    if slower_low > fail_over:
        return row("slower", by)
    if slower_high < -fail_over:
        return row("faster", by)
    return row("same" if -fail_over <= slower_low and slower_high <= fail_over else "unsure", by)


def _warnings(old: Run, new: Run) -> list[str]:
    differing = [
        f"{name} {old.machine[name] or 'unknown'} against {new.machine[name] or 'unknown'}"
        for name in old.machine
        if name in new.machine and old.machine[name] != new.machine[name]
    ]
    found = []
    if differing:
        found.append(f"The runs differ in more than the code: {'; '.join(differing)}.")
    found += [f"Old run: {warning}" for warning in old.warnings]
    return found + [f"New run: {warning}" for warning in new.warnings]
