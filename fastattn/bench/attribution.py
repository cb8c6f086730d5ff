"""What a speed-up is made of: contenders in a chain, one thing switched on at a time.

The rows of one measurement are enough: its rounds are paired, so any two of them have a ratio and an
interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastattn.bench.contenders import BUILDERS, DTYPES, label
from fastattn.bench.ratio import MINIMUM_ROUNDS, Ratio, paired_ratio
from fastattn.bench.rows import Row
from fastattn.bench.workloads import Workload

if TYPE_CHECKING:
    from fastattn.bench.result import Measurement

__all__ = ["Attribution", "Step", "attributions"]


@dataclass(frozen=True)
class Step:
    """One thing switched on.

    Attributes:
        name: what it is: "kernels", "padding removal", "precision bf16", "graph". Where the step before has
            no row to tell it by, both are in one ratio and the name says so: "kernels and padding removal".
        contender: the name of the row that has it.
        over: the name of the row before it, which the ratio is over.
        ratio: time of `over` over time of `contender`; None where there is none.
        reason: why there is no ratio; empty where there is one.
    """

    name: str
    contender: str
    over: str
    ratio: Ratio | None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ratio": self.ratio.to_dict() if self.ratio else None}


@dataclass(frozen=True)
class Attribution:
    """One chain of contenders for one workload.

    Every ratio is a median over rounds of its own, and a median of products is not the product of medians:
    the steps multiplied differ from `total`, by a percent or so on a quiet machine. `remainder` is that
    difference, to be shown as a step of its own and never shared out among the others.

    Attributes:
        workload: that was measured.
        path: "PyTorch" or "ONNX Runtime".
        start: the name of the first row: the faster of the untouched models.
        start_ms, end_ms: median milliseconds of the first row and of the last one with a ratio.
        steps: in the order in which things are switched on.
        total: time of the first row over time of the last one with a ratio; None where no step has one.
    """

    workload: Workload
    path: str
    start: str
    start_ms: float | None
    end_ms: float | None
    steps: tuple[Step, ...]
    total: Ratio | None

    @property
    def remainder(self) -> float | None:
        """`total` over the product of the steps: 1 where they multiply to it."""
        if self.total is None:
            return None
        return self.total.value / math.prod(step.ratio.value for step in self.steps if step.ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "workload": self.workload.to_dict(),
            "path": self.path,
            "start": self.start,
            "start_ms": self.start_ms,
            "end_ms": self.end_ms,
            "steps": [step.to_dict() for step in self.steps],
            "total": self.total.to_dict() if self.total else None,
            "remainder": self.remainder,
        }


def attributions(measurement: Measurement) -> tuple[Attribution, ...]:
    """The chains that a measurement's rows make: PyTorch's and, where our export was asked for, ONNX's.

    PyTorch: the untouched model, fastattn's layers on the padded batch ("kernels"), on real tokens alone
    ("padding removal"; 1 where nothing is padded), in the first lower precision ("precision bf16"), as a CUDA
    graph ("graph"; on a GPU). ONNX Runtime: the same as far as padding removal, then our export ("graph") and
    its first lower precision.

    Args:
        measurement: `row.baseline` marks the start. Contenders that were not asked for are steps without a
            ratio.

    Returns:
        A chain for each path of which at least one contender was asked for and is there: an export is not,
            where the workload trains.
    """
    rows = {row.name: row for row in measurement.rows}
    baseline = measurement.baseline
    start = baseline.name if baseline else label("sdpa", "fp32")
    # Where fp32 was not asked for, precision is no step of the way, and an export in fp32 lies off it.
    dtype = baseline.dtype if baseline else "fp32"
    layers = [
        ("kernels", label("fastattn-padded", dtype)),
        ("padding removal", label("fastattn", dtype)),
    ]
    torch_chain = list(layers)
    lower = [each for each in DTYPES if dtype == "fp32" != each]
    precision = _first(rows, {each: label("fastattn", each) for each in lower})
    if precision is not None:
        torch_chain.append((f"precision {precision}", label("fastattn", precision)))
    if any(row.device_ms for row in measurement.rows):
        torch_chain.append(("graph", label("fastattn-graph", precision or dtype)))

    onnx_chain = [*layers, ("graph", label("onnx", "fp32"))]
    exports = {key: builder.precisions[0] for key, builder in BUILDERS.items() if key.startswith("onnx-")}
    smaller = _first(rows, {each: label(key, each) for key, each in exports.items()})
    if smaller is not None:
        onnx_chain.append((f"precision {smaller}", label("onnx", smaller)))

    chains = {"PyTorch": torch_chain, "ONNX Runtime": onnx_chain}
    asked = {"PyTorch": torch_chain, "ONNX Runtime": onnx_chain[len(layers) :] if dtype == "fp32" else []}
    return tuple(
        _attribution(measurement.workload, path, rows, start, chain)
        for path, chain in chains.items()
        if any(name in rows and rows[name].status != "missing" for _, name in asked[path])
    )


def _first(rows: dict[str, Row], candidates: dict[str, str]) -> str | None:
    """The first precision whose row was measured; else the first that was asked for."""
    asked = [precision for precision, name in candidates.items() if name in rows]
    measured = [precision for precision in asked if rows[candidates[precision]].status == "measured"]
    return next(iter([*measured, *asked]), None)


def _attribution(
    workload: Workload, path: str, rows: dict[str, Row], start: str, chain: Sequence[tuple[str, str]]
) -> Attribution:
    first = rows.get(start)
    problem = _problem(first, start)
    last = first if not problem else None
    steps: list[Step] = []
    pending: list[str] = []
    for name, contender in chain:
        reason = problem or _problem(rows.get(contender), contender)
        ratio = None
        if last is not None and not reason:
            ratio, reason = _ratio(last, rows[contender])
        over = last.name if last is not None else start
        if ratio is None:
            steps.append(Step(name, contender, over, None, reason))
            pending.append(name)
        else:
            both = f"{', '.join(pending)} and {name}" if pending else name
            steps.append(Step(both, contender, over, ratio))
            pending, last = [], rows[contender]
    total = _ratio(first, last)[0] if first is not None and last is not None and last is not first else None
    start_ms = first.median_ms if first is not None else None
    end_ms = last.median_ms if total is not None and last is not None else None
    return Attribution(workload, path, start, start_ms, end_ms, tuple(steps), total)


def _problem(row: Row | None, name: str) -> str:
    """Why a row tells nothing; empty where it does."""
    if row is None:
        return f"{name} is not among the contenders"
    if row.status != "measured":
        return row.reason or f"{name}: {row.status}"
    if not row.wall_ms:
        return f"{name} was not timed"
    return "" if row.parity is not None else f"no ratio: parity of {name} was not checked"


def _ratio(over: Row, row: Row) -> tuple[Ratio | None, str]:
    """The ratio of two rows, or why there is none."""
    if len(over.wall_ms) != len(row.wall_ms):
        return None, f"no ratio: {len(row.wall_ms)} rounds against {len(over.wall_ms)} of {over.name}"
    ratio = paired_ratio(over.wall_ms, row.wall_ms, over.name)
    return ratio, "" if ratio else f"no ratio: an interval takes {MINIMUM_ROUNDS} rounds"
