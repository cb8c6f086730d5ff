"""Attribution, roofline and scaling as plain text for a terminal."""

from __future__ import annotations

from fastattn.bench.attribution import Attribution
from fastattn.bench.roofline import Roofline
from fastattn.bench.scaling import Scaling
from fastattn.report import format_table

__all__ = ["attribution_text", "roofline_text", "scaling_text"]

_OPERATIONS = 12


def attribution_text(attribution: Attribution) -> str:
    """The steps from the untouched model to the last contender, one thing switched on at a time."""
    rows = []
    for step in attribution.steps:
        rows.append((step.name, str(step.ratio) if step.ratio else step.reason, step.contender))
    total = f"{attribution.total}, {attribution.start_ms:.4g} to {attribution.end_ms:.4g} ms"
    rows.append(("all of it", total, ""))
    title = f"what it is due to, {attribution.path}, {attribution.workload}, from {attribution.start}"
    return f"{title}\n{format_table(('switched on', 'times as fast (95%)', 'contender'), rows)}"


def roofline_text(roofline: Roofline) -> str:
    """The operations that take longest, each with its part of the ceiling that bounds it."""
    points = sorted(roofline.points, key=lambda point: -point.cost.time_ms)
    rows = [
        (
            point.cost.op,
            point.cost.shapes,
            f"{point.cost.calls}",
            f"{point.cost.time_ms:.3g}",
            _giga(point.flop_per_s),
            _giga(point.bytes_per_s),
            point.bound,
            "-" if point.percent is None else f"{point.percent:.0f}%",
        )
        for point in points[:_OPERATIONS]
    ]
    left_out = len(points) - len(rows)
    more = f"\n{left_out} more operations take {sum(p.cost.time_ms for p in points[_OPERATIONS:]):.3g} ms"
    ceilings = roofline.ceilings
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in ceilings.flop_per_s.items())
    title = f"roofline, {roofline.title}: memory {ceilings.read_bytes_per_s / 1e9:.1f} GB/s, {rates}"
    columns = ("operation", "shapes", "calls", "ms", "GFLOP/s", "GB/s", "bound by", "of ceiling")
    return f"{title}\n{format_table(columns, rows)}{more if left_out else ''}"


def _giga(rate: float | None) -> str:
    return "-" if rate is None else f"{rate / 1e9:.1f}"


def scaling_text(scaling: Scaling) -> str:
    """Times along the axis, and how they grow."""
    fixed = ", ".join(f"{name} {value:g}" for name, value in scaling.fixed.items())
    values = [point.value for point in scaling.curves[0].points] if scaling.curves else []
    rows = []
    for curve in scaling.curves:
        times = ["-" if point.median_ms is None else f"{point.median_ms:.4g}" for point in curve.points]
        fit = curve.time_fit
        grows = "-" if fit is None or fit.exponent is None else f"n^{fit.exponent:.2f}"
        formula = "-" if fit is None else fit.formula
        rows.append((curve.contender, *times, grows, formula))
    columns = ("ms at " + scaling.axis, *(f"{value:g}" for value in values), "grows as", "fit")
    return f"scaling with {scaling.axis} ({fixed})\n{format_table(columns, rows)}"
