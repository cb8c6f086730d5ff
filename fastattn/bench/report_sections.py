"""Sections of a page out of what was measured: plots, and beside each a table that needs no script.

Each function returns no section where there is nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastattn.bench.ratio import LEVEL
from fastattn.bench.report import (
    Bar,
    BarsPlot,
    Cell,
    Fall,
    Line,
    LinePlot,
    Point,
    RatioPlot,
    Roof,
    RooflinePlot,
    RoofOp,
    Section,
    Table,
    TimePlot,
    Waterfall,
)
from fastattn.bench.report_bars import number, shortened
from fastattn.bench.row_table import cold_table
from fastattn.bench.rows import PERCENTILES, Row, percentiles

if TYPE_CHECKING:
    from fastattn.bench.attribution import Attribution
    from fastattn.bench.roofline import Roofline
    from fastattn.bench.scaling import Curve, Fit, Scaling

__all__ = [
    "attribution_sections",
    "cold_start_sections",
    "memory_sections",
    "parts_sections",
    "roofline_sections",
    "scaling_sections",
    "time_sections",
]

_MIB = 1024 * 1024
_PARTS = {"first_token_ms": "time to the first token", "inter_token_ms": "time between tokens"}
_TABLE_OPS = 25
_CURVE_POINTS = 48


def time_sections(rows: Sequence[Row]) -> list[Section]:
    """Bars of the median times, and ratios with their intervals."""
    sections: list[Section] = []
    bars = [
        Bar(row.name, row.median_ms, row.min_ms, row.p90_ms, row.highlight)
        for row in rows
        if row.median_ms is not None and row.min_ms is not None and row.p90_ms is not None
    ]
    if bars:
        sections.append(
            TimePlot("Time a call", bars, note="Bar: median; whisker: minimum to 90th percentile.")
        )
    points = [Point(r.name, r.ratio.value, r.ratio.low, r.ratio.high, r.highlight) for r in rows if r.ratio]
    if points:
        over = next(row.ratio.baseline for row in rows if row.ratio)
        note = f"Median over paired rounds with its {LEVEL:.0%} interval."
        sections.append(RatioPlot(f"Speed-up over {over}", points, note=note))
    return sections


def cold_start_sections(rows: Sequence[Row]) -> list[Section]:
    """What was done once before the first call, and the first call: stacked bars and a table, in seconds."""
    cold = [row for row in rows if row.first_call_ms is not None]
    if not cold:
        return []
    stages = list(dict.fromkeys(stage for row in cold for stage in row.stages_ms))
    series = {stage: [_seconds(row.stages_ms.get(stage)) for row in cold] for stage in stages}
    series["first call"] = [_seconds(row.first_call_ms) for row in cold]
    note = "Once each, before anything is warm; the first call includes whatever it compiles."
    names, ours = [row.name for row in cold], [row.name for row in cold if row.highlight]
    plot = BarsPlot("Cold start", names, series, unit="s", stacked=True, highlights=ours, note=note)
    return [plot, Table("", *cold_table(rows))]


def memory_sections(rows: Sequence[Row]) -> list[Section]:
    """What each contender adds at its peak, in MiB of the host's and the device's memory, as bars.

    The same figures are columns of `row_table`.
    """
    known = [row for row in rows if row.peak_host_bytes is not None or row.peak_device_bytes is not None]
    if not known:
        return []
    series = {
        "host": [_mib(row.peak_host_bytes) for row in known],
        "device": [_mib(row.peak_device_bytes) for row in known],
    }
    series = {name: values for name, values in series.items() if any(value is not None for value in values)}
    where = " and the ".join(series)
    note = (
        f"What the contender adds at its peak in memory of the {where}: weights, arenas and working memory."
    )
    names, ours = [row.name for row in known], [row.name for row in known if row.highlight]
    return [BarsPlot("Peak memory", names, series, unit="MiB", highlights=ours, note=note)]


def parts_sections(rows: Sequence[Row]) -> list[Section]:
    """The named parts of a call, such as the first token and the gaps between tokens: p50, p90 and p99."""
    sections: list[Section] = []
    parts = list(dict.fromkeys(part for row in rows for part in row.parts_ms))
    cells: list[list[str | None]] = []
    for part in parts:
        name = _PARTS.get(part, part.removesuffix("_ms").replace("_", " "))
        having = [row for row in rows if row.parts_ms.get(part)]
        if not having:
            continue
        figures = {row.name: percentiles(row.parts_ms[part]) for row in having}
        series = {f"p{level}": [figures[row.name][level] for row in having] for level in PERCENTILES}
        sections.append(BarsPlot(f"{name[0].upper()}{name[1:]}", [row.name for row in having], series))
        cells += [
            [
                row.name,
                name,
                *(_figure(figures[row.name][level]) for level in PERCENTILES),
                str(len(row.parts_ms[part])),
            ]
            for row in having
        ]
    if sections:
        columns = ["contender", "part", *(f"p{level} ms" for level in PERCENTILES), "samples"]
        sections.append(Table("Parts of a call", columns, cells, note="Over all rounds."))
    return sections


def attribution_sections(attribution: Attribution) -> list[Section]:
    """A waterfall from the untouched model's time to the last contender's, and a table of the steps."""
    if attribution.start_ms is None:
        return []
    now, last = attribution.start_ms, ""
    falls = [Fall(attribution.start, None, now, now, now, f"{number(now)} ms")]
    cells: list[list[str | Cell | None]] = [
        [Cell("start", "muted"), attribution.start, None, _figure(now), None]
    ]
    for step in attribution.steps:
        ratio = step.ratio
        if ratio is None:
            reason = f"not measured: {step.reason}" if step.reason else "not measured"
            falls.append(Fall(step.name, now, now, now, now, "not measured"))
            cells.append([step.name, step.contender, step.over, None, Cell(reason, "muted")])
            continue
        after = now / ratio.value
        falls.append(Fall(step.name, now, after, now / ratio.high, now / ratio.low, str(ratio)))
        cells.append([step.name, step.contender, step.over, _figure(after), str(ratio)])
        now, last = after, step.contender
    end = attribution.end_ms
    if end is not None and last:
        total = f", {attribution.total.value:.2f}x" if attribution.total else ""
        falls.append(Fall(last, None, end, end, end, f"{number(end)} ms{total}"))
        cells.append(
            [Cell("in all", "muted"), last, attribution.start, _figure(end), _ratio(attribution.total)]
        )
    note = (
        "Each step divides the time before it by its ratio, the median over paired rounds; whisker: its 95% "
        "interval. The last bar is measured itself, so that the steps need not add up to it exactly."
    )
    unmeasured = [step.name for step in attribution.steps if step.ratio is None]
    if unmeasured:
        note += f" Not measured, so in none of the bars: {', '.join(unmeasured)}."
    heading = f"What the speed-up is made of: {attribution.path}, {attribution.workload}"
    columns = ["switched on", "contender", "over", "ms after it", "times as fast (95%)"]
    return [Waterfall(heading, falls, note=note), Table("", columns, cells)]


def scaling_sections(scaling: Scaling, highlights: Sequence[str] = ()) -> list[Section]:
    """Time and memory against one axis: a plot of each with its table.

    Args:
        highlights: names of contenders whose lines are drawn thicker.
    """
    fixed = ", ".join(
        f"{name} {value:.0%}" if name == "fill" else f"{name} {value:g}"
        for name, value in scaling.fixed.items()
    )
    of = f"against {scaling.axis}" + (f" ({fixed})" if fixed else "")
    plots: list[Section] = []
    tables: list[Section] = []
    for heading, unit, memory in ((f"Latency {of}", "ms", False), (f"Peak memory {of}", "MiB", True)):
        lines = [_line(curve, memory, curve.contender in highlights) for curve in scaling.curves]
        lines = [line for line in lines if line.points]
        if not lines:
            continue
        note = "" if memory else "Whiskers: 10th to 90th percentile of the rounds. "
        note += "Lines: the fitted curves of the table below." if any(line.curve for line in lines) else ""
        plots.append(LinePlot(heading, lines, _AXES[scaling.axis], unit, note=note))
        tables.append(_scaling_table(scaling, heading, unit, memory))
    return plots + tables


_AXES = {"length": "length, tokens", "batch": "batch, sequences", "fill": "fill, real tokens over positions"}


def _line(curve: Curve, memory: bool, highlight: bool) -> Line:
    points: list[tuple[float, float, float, float]] = []
    for point in curve.points:
        if memory and point.peak_bytes is not None:
            peak = point.peak_bytes / _MIB
            points.append((point.value, peak, peak, peak))
        elif not memory and point.median_ms is not None:
            low = point.median_ms if point.low_ms is None else point.low_ms
            high = point.median_ms if point.high_ms is None else point.high_ms
            points.append((point.value, point.median_ms, low, high))
    fit = curve.memory_fit if memory else curve.time_fit
    drawn: list[tuple[float, float]] = []
    if fit is not None and len(points) > 1:
        first, last = points[0][0], points[-1][0]
        # Evenly spaced on a logarithmic axis too.
        step = (last / first) ** (1 / (_CURVE_POINTS - 1))
        values = [first * step**index for index in range(_CURVE_POINTS)]
        drawn = [(value, fit.at(value) / (_MIB if memory else 1)) for value in values]
        # A logarithmic axis has no place for zero.
        drawn = [(x, y) for x, y in drawn if y > 0]
    return Line(curve.contender, points, drawn, highlight)


def _scaling_table(scaling: Scaling, heading: str, unit: str, memory: bool) -> Table:
    values = sorted({point.value for curve in scaling.curves for point in curve.points})
    marks = [f"{value:.0%}" if scaling.axis == "fill" else f"{value:g}" for value in values]
    cells: list[list[str | Cell | None]] = []
    reasons: list[str] = []
    for curve in scaling.curves:
        found = {point.value: point for point in curve.points}
        line: list[str | Cell | None] = [curve.contender]
        for value, mark in zip(values, marks, strict=True):
            point = found.get(value)
            if point is None:
                line.append(None)
            elif memory or point.median_ms is not None:
                line.append(_figure(_mib(point.peak_bytes) if memory else point.median_ms))
            else:
                # Whole reasons would leave the numbers no room: they are below the table.
                line.append(Cell("out of memory" if point.reason.startswith("out of memory") else "-", "bad"))
                reasons.append(f"{curve.contender} at {mark}: {point.reason or 'not measured'}.")
        fit = curve.memory_fit if memory else curve.time_fit
        line += [
            _formula(fit, _MIB if memory else 1),
            _figure(fit.r2 if fit else None),
            _figure(fit.exponent if fit else None),
        ]
        cells.append(line)
    columns = ["contender", *marks, f"fit, {unit}", "R²", "grows as n^"]
    return Table(f"{heading}, {unit}", columns, cells, note=" ".join(reasons))


def _formula(fit: Fit | None, scale: float) -> str | None:
    """A fit's formula with its coefficients, divided by `scale`, in place of their names."""
    if fit is None:
        return None
    return " + ".join(
        " ".join([f"{fit.coefficients[name] / scale:.3g}" if name in fit.coefficients else name, *rest])
        for name, *rest in (term.split() for term in fit.formula.split(" + "))
    )


def roofline_sections(roofline: Roofline) -> list[Section]:
    """Operations below the machine's roofs, slowest first, and the same as a table."""
    ceilings, points = roofline.ceilings, roofline.points
    roofs = [
        Roof(dtype, ceilings.copy_bytes_per_s, flop_per_s)
        for dtype, flop_per_s in ceilings.flop_per_s.items()
        if any(point.cost.dtype == dtype for point in points)
    ]
    names = {roof.label for roof in roofs}
    whole_ms = math.fsum(point.cost.time_ms for point in points) or 1.0
    ops: list[RoofOp] = []
    cells: list[list[str | Cell | None]] = []
    for place, point in enumerate(points[:_TABLE_OPS], start=1):
        cost, share = point.cost, point.cost.time_ms / whole_ms
        percent = None if point.percent is None else f"{point.percent:.0f}%"
        if point.intensity > 0 and point.flop_per_s and cost.dtype in names:
            notes = (
                shortened(cost.shapes, 60),
                f"{cost.time_ms:.3g} ms in {cost.calls} calls, {share:.0%} of the time",
                f"{percent or 'unknown share'} of the ceiling, bound by {point.bound}",
            )
            ops.append(RoofOp(place, cost.op, point.intensity, point.flop_per_s, cost.dtype, share, notes))
        cells.append(
            [
                f"#{place} {cost.op}",
                cost.shapes,
                cost.dtype,
                str(cost.calls),
                _figure(cost.time_ms),
                f"{share:.0%}",
                _figure(point.intensity),
                _giga(point.flop_per_s),
                _giga(point.bytes_per_s),
                point.bound,
                percent,
            ]
        )
    columns = ["operation", "shapes", "dtype", "calls", "ms", "time", "FLOP/byte", "GFLOP/s", "GB/s"]
    columns += ["bound by", "of ceiling"]
    arithmetic = ", ".join(f"{name} {rate / 1e9:.4g} GFLOP/s" for name, rate in ceilings.flop_per_s.items())
    where = ceilings.device + (f", {ceilings.threads} threads" if ceilings.threads else "")
    note = (
        f"Measured here ({where}): copying {ceilings.copy_bytes_per_s / 1e9:.4g} GB/s, reading "
        f"{ceilings.read_bytes_per_s / 1e9:.4g} GB/s, {arithmetic}. The whole call took "
        f"{roofline.total_ms:.4g} ms; its ceiling is {roofline.percent:.0f}% of that. A point's area is its "
        "share of the time, its number that of the table. Above the roof lies what the caches served."
    )
    missing = sum(1 for point in points[:_TABLE_OPS]) - len(ops)
    if missing:
        note += f" {missing} operations without counted arithmetic are in the table alone."
    left = points[_TABLE_OPS:]
    rest = math.fsum(point.cost.time_ms for point in left) / whole_ms
    table_note = f"And {len(left)} more with {rest:.0%} of the time." if left else ""
    plot: list[Section] = [RooflinePlot(f"Roofline: {roofline.title}", roofs, ops, note)] if ops else []
    return [*plot, Table("" if plot else f"Roofline: {roofline.title}", columns, cells, note=table_note)]


def _giga(value: float | None) -> str | None:
    return None if value is None else f"{value / 1e9:.3g}"


def _mib(value: int | None) -> float | None:
    return None if value is None else value / _MIB


def _seconds(value_ms: float | None) -> float | None:
    return None if value_ms is None else value_ms / 1e3


def _figure(value: float | None) -> str | None:
    return None if value is None else number(value)


def _ratio(ratio: object | None) -> str | None:
    return None if ratio is None else str(ratio)
