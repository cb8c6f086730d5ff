"""One benchmark while it runs: contenders built once for all workloads, and what is measured with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastattn.bench.ceilings import Ceilings, measure_ceilings
from fastattn.bench.choices import planned
from fastattn.bench.contenders import BUILDERS, DTYPES, UNTOUCHED, Runner, Source, Stages, label
from fastattn.bench.contenders.isolated import build as isolated_contender
from fastattn.bench.memory import Memory, MemoryMeter, memory_limit
from fastattn.bench.parity import Parity
from fastattn.bench.result import Measurement
from fastattn.bench.roofline import Roofline, roofline
from fastattn.bench.rows import Row
from fastattn.bench.scaling import Scaling, scaling
from fastattn.bench.tasks import Work, work_for
from fastattn.bench.timing import Contender, MissingError, Prepared, describe, measure
from fastattn.bench.workloads import Workload
from fastattn.layers import rounds_inputs

__all__ = ["FORWARD_TASKS", "SCALING_AXES", "Session"]

SCALING_AXES = ("length", "batch", "fill")
# Scaling asks how time grows, not who is fastest: few contenders, each point short.
_SCALED = ("sdpa", "fastattn")
_SCALING_POINT_S = 1.0
FORWARD_TASKS = ("encode", "classify", "prefill")


@dataclass(frozen=True)
class Built:
    """A contender made ready for all workloads, what that took, the memory it holds since, and the versions
    of packages that are not this process'.
    """

    runner: Runner
    stages_ms: Mapping[str, float]
    held: Memory
    versions: Mapping[str, str]


@dataclass
class Session:
    """What all workloads of a benchmark share.

    Attributes:
        source: where contenders come from.
        names: keys of BUILDERS.
        dtypes: of contenders that have no precision of their own, the first of them the baseline's.
        automatic: whether the caller left the choice of contenders to us.
        min_rounds, until, progress, isolate: as `benchmark` takes them.
    """

    source: Source
    names: Sequence[str]
    dtypes: Sequence[str]
    automatic: bool
    min_rounds: int
    until: float | None
    progress: bool
    isolate: bool
    _built: dict[tuple[str, str, bool], Built | Exception] = field(default_factory=dict)
    _ceilings: Ceilings | None = None

    def built(self, key: str, precision: str, *, isolated: bool = False) -> Built:
        """A contender, built once; one that cannot be built fails the same way each time.

        Args:
            isolated: in a process of its own.
        """
        name = (key, precision, isolated)
        if name not in self._built:
            meter = MemoryMeter(self.source.device.type)
            stages = Stages(memory=meter)
            try:
                if isolated:
                    runner = isolated_contender(self.source, key, precision, stages)
                else:
                    runner = BUILDERS[key].build(self.source, precision, stages)
                self._built[name] = Built(runner, stages.times_ms, meter.added(), stages.versions)
            except Exception as error:
                self._built[name] = error
        found = self._built[name]
        if isinstance(found, Exception):
            raise found
        return found

    def measure(
        self,
        workload: Workload,
        budget_s: float,
        names: Sequence[str] | None = None,
        dtypes: Sequence[str] | None = None,
    ) -> Measurement:
        """One workload: the reference's answer, then every contender interleaved."""
        dtypes = dtypes or self.dtypes
        pairs = planned(names or self.names, dtypes, workload, self.source.kind, automatic=self.automatic)
        work = work_for(workload, self.source.model, self.source.kind, self.source.device)
        reference, problems = "", []
        # The untouched eager model in fp32; SDPA where a shape is too large for it.
        for key in UNTOUCHED:
            try:
                with memory_limit():
                    work.expect(self.built(key, "fp32").runner)
                reference = label(key, "fp32")
                break
            except Exception as error:
                problems.append(f"{label(key, 'fp32')}: {describe(error)}")
        if not reference:
            why = f"no reference to compare with: {'; '.join(problems)}"
            return Measurement(
                workload, tuple(Row(label(*each), each[1], "failed", why) for each in pairs), ""
            )

        def check(contender: Contender, answer: Any) -> Parity:
            held_to = contender.dtype
            if held_to in DTYPES and rounds_inputs(self.source.model):
                # Right answers of such a model differ by what the rounding costs.
                held_to = "int8"
            return work.check(held_to, answer, self._limit(work, held_to))

        first = dtypes[0]
        rows = measure(
            [
                Contender(
                    label(key, precision),
                    prepare=partial(self._prepare, key, precision, work),
                    dtype=precision,
                    against=label("sdpa", precision) if precision in dtypes[1:] else None,
                    highlight=BUILDERS[key].ours,
                )
                for key, precision in pairs
            ],
            check=check,
            baseline=[label(*pair) for pair in pairs if pair[0] in UNTOUCHED and pair[1] == first],
            device=self.source.device.type,
            budget_s=budget_s,
            min_rounds=self.min_rounds,
            until=self.until,
            progress=self.progress,
            label=str(workload),
        )
        # What is missing is missing in every precision.
        missing = {row.reason for row in rows if row.status == "missing" and row.dtype == first}
        kept = (
            row for row in rows if row.dtype == first or row.status != "missing" or row.reason not in missing
        )
        return Measurement(workload, tuple(kept), reference)

    def rooflines(self, workload: Workload) -> list[Roofline]:
        """The operations of the untouched and of the swapped model, set against ceilings measured here."""
        device = self.source.device.type
        if self._ceilings is None:
            self._ceilings = measure_ceilings(device, self.dtypes)
        work = work_for(workload, self.source.model, self.source.kind, self.source.device)
        found = []
        for key in ("sdpa", "fastattn"):
            for dtype in self.dtypes:
                try:
                    run = work.prepared(self.built(key, dtype).runner, dtype).run
                except Exception:  # its row says why
                    continue
                title = f"{label(key, dtype)}, {workload}"
                found.append(roofline(run, title, device=device, ceilings=self._ceilings))
        return found

    def scaling(self, axis: str, base: Workload, limit: int | None) -> Scaling:
        """Time and memory of the untouched and the swapped model along one axis, the rest as in `base`."""
        values: dict[str, Sequence[float]] = {
            "length": [
                n for n in (16, 32, 64, 128, 256, 512) if limit is None or n + base.new_tokens <= limit
            ],
            "batch": (1, 2, 4, 8, 16),
            "fill": (0.25, 0.5, 0.75, 1.0),
        }

        # A text's own tokens have one length: along an axis, its shape counts.
        plain = Workload(base.batch, base.seq, base.fill, base.seed, base.task, base.new_tokens)

        def measure_one(workload: Workload) -> Sequence[Row]:
            return self.measure(workload, _SCALING_POINT_S, _SCALED, self.dtypes[:1]).rows

        return scaling(axis, values[axis], measure_one, plain)

    def _prepare(self, key: str, precision: str, work: Work) -> Prepared:
        builder, kind, task = BUILDERS[key], self.source.kind, work.workload.task
        if kind not in builder.kinds:
            kinds = ", ".join(sorted(builder.kinds))
            raise MissingError(f"models of kind {kind!r} with {builder.label}: it runs {kinds}")
        if task not in builder.tasks:
            raise MissingError(f"{task!r} with {builder.label}: it does {', '.join(sorted(builder.tasks))}")
        built = self.built(key, precision, isolated=self.isolate and not builder.remote)
        return replace(
            work.prepared(built.runner, precision),
            stages_ms=built.stages_ms,
            held=built.held,
            versions=built.versions,
        )

    def _limit(self, work: Work, precision: str) -> float:
        return work.limit(precision, self._untouched(precision) if precision in DTYPES else None)

    def _untouched(self, precision: str) -> Runner:
        """The untouched model in a lower precision: SDPA, or eager where it has none."""
        try:
            return self.built("sdpa", precision).runner
        except MissingError:
            return self.built("eager", precision).runner
