"""The page of a sweep: the frontier as a plot, every point in a table, what failed, and the machine."""

from __future__ import annotations

from dataclasses import replace

from fastattn.bench.ratio import METHOD
from fastattn.bench.report import Cell, Environment, Report, Section, Spot, SpotPlot, Table, Text
from fastattn.compress.frontier import UNTOUCHED, SweepPoint, SweepResult, number, pareto, speed_text

__all__ = ["sweep_page"]


def sweep_page(result: SweepResult) -> Report:
    """The page as a `Report`, still to be written.

    Example:
        >>> point = SweepPoint("untouched", score=0.9, model_bytes=10, latency_ms=2.0, speed_up=1.0)
        >>> "untouched" in sweep_page(SweepResult((point,), "Model")).html(scripts=False)
        True
    """
    sections: list[Section] = []
    joined = _joined(result)
    if spots := [
        _spot(place, point, result, point.name in joined)
        for place, point in enumerate(result.points, start=1)
        if point.status == "measured"
    ]:
        sections.append(
            SpotPlot(
                "What speed costs",
                spots,
                "times as fast as the untouched model",
                result.metric,
                f"{'More' if result.higher_is_better else 'Less'} {result.metric} is better; a larger marker "
                "is a larger model. Coloured: no other point is as good in score, size and speed, and better "
                f"in one; the line leaves size out. Times: {result.workload}.",
            )
        )
    sections.append(_table(result))
    failed = [f"{point.name}: {point.status}: {point.reason}" for point in result.points if point.reason]
    if failed:
        sections.append(Text("Not measured", failed))
    notes = [f"{point.name}: {note}" for point in result.points for note in point.notes]
    if notes:
        sections.append(Text("Notes", notes))
    how = [f"Contenders alternate in one process; {METHOD}."]
    if any(point.options.get("export") is not None for point in result.points):
        how.append(
            "Exports run in ONNX Runtime on as many threads as PyTorch; their size is that of the files, "
            "graphs and weights. A turn begins when the threads of the one before have come to rest."
        )
    sections.append(Text("How it was measured", how))
    sections.append(Environment(result.environment))
    return Report(f"{result.model}: what compression costs and gains", _summary(result), sections)


def _summary(result: SweepResult) -> list[str]:
    untouched, said = result.untouched, []
    if untouched.score is not None and untouched.model_bytes is not None:
        said.append(
            f"Untouched: {result.metric} {number(untouched.score)}, {untouched.model_bytes / 1e6:.1f} MB, "
            f"{number(untouched.latency_ms)} ms for {result.workload}."
        )
    compressed = [point for point in result.frontier if point.name != UNTOUCHED]
    said += [_sentence(point, result) for point in sorted(compressed, key=lambda each: -(each.speed_up or 0))]
    missing = sum(point.status != "measured" for point in result.points)
    if missing:
        said.append(f"{missing} of {len(result.points)} points were not measured; the reasons are below.")
    return said


def _sentence(point: SweepPoint, result: SweepResult) -> str:
    return (
        f"{point.name}: {speed_text(point)} as fast, {_share(point, result)} of the size, {result.metric} "
        f"{number(point.score)}{_change(point, result)}."
    )


def _share(point: SweepPoint, result: SweepResult) -> str:
    whole = result.untouched.model_bytes
    return "-" if not whole or point.model_bytes is None else f"{point.model_bytes / whole:.0%}"


def _change(point: SweepPoint, result: SweepResult) -> str:
    before = result.untouched.score
    return "" if before is None or point.score is None else f" ({point.score - before:+.4g})"


def _joined(result: SweepResult) -> set[str]:
    """The points that are on the frontier of score and speed alone."""
    alone = [replace(point, model_bytes=point.model_bytes and 1) for point in result.points]
    return {point.name for point in pareto(alone, higher_is_better=result.higher_is_better) if point.pareto}


def _spot(place: int, point: SweepPoint, result: SweepResult, joined: bool) -> Spot:
    assert point.speed_up is not None and point.score is not None and point.model_bytes is not None
    return Spot(
        place,
        point.name,
        point.speed_up,
        point.score,
        point.speed_up_low or point.speed_up,
        point.speed_up_high or point.speed_up,
        point.model_bytes,
        point.pareto,
        joined,
        (
            f"{result.metric} {number(point.score)}{_change(point, result)}",
            f"{speed_text(point)} as fast, {number(point.latency_ms)} ms",
            f"{point.model_bytes / 1e6:.1f} MB, {_share(point, result)} of the untouched model",
        ),
    )


def _table(result: SweepResult) -> Table:
    rows: list[list[str | float | Cell | None]] = []
    for place, point in enumerate(result.points, start=1):
        if point.status != "measured":
            rows.append([point.name, place, Cell(point.status, "bad"), *[Cell("-", "muted")] * 5])
            continue
        interval = (
            Cell("-", "muted")
            if point.speed_up_low is None or point.speed_up_high is None
            else f"{point.speed_up_low:.2f} to {point.speed_up_high:.2f}"
        )
        size = None if point.model_bytes is None else f"{point.model_bytes / 1e6:.2f}"
        rows.append(
            [
                point.name,
                place,
                Cell("frontier", "good") if point.pareto else Cell("", "muted"),
                number(point.score),
                size,
                number(point.latency_ms),
                speed_text(point),
                interval,
            ]
        )
    columns = ["point", "#", "", result.metric, "MB", "ms", "faster", "95% interval"]
    return Table("Every point", columns, rows)
