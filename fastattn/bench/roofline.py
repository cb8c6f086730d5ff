"""Each operation of a call against what the machine can do: bytes, FLOP and percent of the ceiling."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from fastattn.bench.ceilings import Ceilings, measure_ceilings
from fastattn.bench.contenders.source import DTYPES
from fastattn.bench.op_costs import OpCost, count

__all__ = ["RoofPoint", "Roofline", "roofline"]


@dataclass(frozen=True)
class RoofPoint:
    """One operation below the roof.

    Attributes:
        cost: its FLOP, bytes and time.
        intensity: FLOP a byte.
        flop_per_s, bytes_per_s: attained; None where the time is too short to tell.
        bound: what sets the least time it could take.
        ceiling_ms: that least time: the larger of bytes over bandwidth and FLOP over peak.
        percent: `ceiling_ms` over the time it took, in percent. May exceed 100: see `roofline`.
    """

    cost: OpCost
    intensity: float
    flop_per_s: float | None
    bytes_per_s: float | None
    bound: Literal["memory", "compute"]
    ceiling_ms: float
    percent: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Roofline:
    """A call's operations, slowest first.

    Attributes:
        title: what was run.
        ceilings: what the machine can do.
        points: one an operation, shapes and dtype.
        total_ms: wall time of the whole call, by itself: with no operation timed.
        percent: the sum of `ceiling_ms` over `total_ms`, in percent.
    """

    title: str
    ceilings: Ceilings
    points: tuple[RoofPoint, ...]
    total_ms: float
    percent: float

    @property
    def ops_ms(self) -> float:
        """Time of the operations, each timed alone."""
        return sum(point.cost.time_ms for point in self.points)

    @property
    def other_ms(self) -> float:
        """What the call takes beyond its operations: dispatch, views, Python. Near 0 or negative where a GPU
        hides them, or where operations are slower one by one.
        """
        return self.total_ms - self.ops_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "title": self.title,
            "ceilings": self.ceilings.to_dict(),
            "points": [point.to_dict() for point in self.points],
            "total_ms": self.total_ms,
            "ops_ms": self.ops_ms,
            "other_ms": self.other_ms,
            "percent": self.percent,
        }


def roofline(
    run: Callable[[], Any],
    title: str,
    *,
    device: str = "cpu",
    ceilings: Ceilings | None = None,
    repeats: int = 5,
) -> Roofline:
    """Where a call's time goes, and how far each of its operations is from what the machine can do.

    The roofline model of Williams, Waterman and Patterson (2009): an operation takes at least its bytes over
    the bandwidth and its FLOP over the peak, and the larger of the two bounds it. Bytes count every input
    and output once, as if it came from memory: what another operation has just left in a cache is faster, so
    a percentage may exceed 100. It is not cut off there.

    Args:
        run: the call: a model's forward, or one operation. See `count` for what it may not be.
        title: names it.
        device: "cpu" or "cuda".
        ceilings: of `measure_ceilings`; measured now if None, for the dtypes that occur. An operation in a
            dtype they lack is held to the highest of their peaks.
        repeats: calls that are counted, and as many that are timed whole between them; medians of both are
            given. One more comes first and is not looked at.

    Raises:
        ValueError: `repeats` is below 1.

    Example:
        >>> x, weight = torch.ones(64, 64), torch.ones(64, 64)
        >>> ceilings = Ceilings("cpu", 1, 1e10, 1e10, {"fp32": 1e11})
        >>> run = lambda: torch.nn.functional.linear(x, weight)
        >>> [point] = roofline(run, "linear", ceilings=ceilings, repeats=2).points
        >>> point.cost.op, point.cost.flop, point.bound
        ('aten.mm', 524288.0, 'compute')
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats!r}; it must be 1 or more")
    run()
    totals, counts = [], []
    for _ in range(repeats):
        totals.append(_total_ms(run, device))
        counts.append(count(run, device))
    costs = _medians(counts)
    if ceilings is None:
        present = {cost.dtype for cost in costs}
        ceilings = measure_ceilings(
            device, [name for name in (*DTYPES, "int8") if name in present] or ["fp32"]
        )
    points = [_point(cost, ceilings) for cost in costs]
    points.sort(key=lambda point: -point.cost.time_ms)
    total = statistics.median(totals)
    return Roofline(
        title, ceilings, tuple(points), total, 100 * sum(point.ceiling_ms for point in points) / total
    )


def _total_ms(run: Callable[[], Any], device: str) -> float:
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3


def _medians(counts: list[tuple[OpCost, ...]]) -> list[OpCost]:
    """The operations of the first count, each with the median of its times in all that have it."""
    times: dict[tuple[str, str, str], list[float]] = {}
    for costs in counts:
        for cost in costs:
            times.setdefault((cost.op, cost.shapes, cost.dtype), []).append(cost.time_ms)
    return [
        replace(cost, time_ms=statistics.median(times[cost.op, cost.shapes, cost.dtype]))
        for cost in counts[0]
    ]


def _point(cost: OpCost, ceilings: Ceilings) -> RoofPoint:
    peak = ceilings.flop_per_s.get(cost.dtype, max(ceilings.flop_per_s.values(), default=float("inf")))
    memory_ms, compute_ms = cost.bytes / ceilings.bytes_per_s * 1e3, cost.flop / peak * 1e3
    ceiling_ms = max(memory_ms, compute_ms)
    seconds = cost.time_ms / 1e3
    return RoofPoint(
        cost,
        intensity=cost.flop / cost.bytes if cost.bytes else 0.0,
        flop_per_s=cost.flop / seconds if seconds else None,
        bytes_per_s=cost.bytes / seconds if seconds else None,
        bound="compute" if compute_ms > memory_ms else "memory",
        ceiling_ms=ceiling_ms,
        percent=100 * ceiling_ms / cost.time_ms if seconds else None,
    )
