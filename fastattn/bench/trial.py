"""A contender while it is measured: what it is made of, its samples, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastattn.bench.contender import Contender, FailedError, MissingError, Prepared, describe
from fastattn.bench.energy import EnergyMeter
from fastattn.bench.memory import Memory, MemoryMeter, is_out_of_memory
from fastattn.bench.parity import Parity
from fastattn.bench.rows import Row, Stopped
from fastattn.bench.timers import Sample, SelfTimed, Timer

__all__ = ["Check", "Trial"]

Check = Callable[[Contender, Any], Parity]

_NOT_REACHED = "interrupted before it was measured"


@dataclass
class Trial:
    """One contender of a measurement.

    Attributes:
        row: what is known of it so far; times come with `finished_row`.
        samples: of the rounds, without outputs, each with the parts of its last call.
        calls: that make one sample.
    """

    contender: Contender
    row: Row = field(init=False)
    samples: list[tuple[Sample, Mapping[str, Sequence[float]]]] = field(default_factory=list)
    calls: int = 1
    _prepared: Prepared | None = None
    _output: Any = None

    def __post_init__(self) -> None:
        name, dtype = self.contender.name, self.contender.dtype
        self.row = Row(name, dtype, "missing", _NOT_REACHED, highlight=self.contender.highlight)

    @property
    def active(self) -> bool:
        """Whether it is ready to be timed, and still right."""
        return self.row.status == "measured"

    @property
    def walls(self) -> tuple[float, ...]:
        """Wall milliseconds a call, one entry a round."""
        return tuple(sample.wall_s * 1e3 / self.calls for sample, _ in self.samples)

    def prepare(
        self,
        timer: Timer,
        check: Check | None,
        warmup: int,
        min_sample_ms: float,
        memory: MemoryMeter | None,
    ) -> None:
        """Make it ready: first call, parity, warm-up, peak memory, and how many calls make a sample."""
        try:
            prepared = self.contender.ready()
            if memory is not None and prepared.held is not None:
                memory.restart()
            first = timer.sample(prepared.run, 1)
            self._prepared, self._output = prepared, first.output
            self.row = replace(
                self.row,
                status="measured",
                reason="",
                stages_ms=dict(prepared.stages_ms),
                versions=dict(prepared.versions),
                first_call_ms=first.wall_s * 1e3,
            )
            seconds = first.wall_s
            del first
            self.verify(check)
            for left in range(warmup - 2, -1, -1):
                if not self.active:
                    return
                # The output of the call before must not count to the peak.
                self._output = None
                metered = memory if left == 0 else None
                if metered is not None:
                    metered.begin_call()
                sample = timer.sample(prepared.run, 1)
                if metered is not None:
                    self._record(metered.end_call(), prepared)
                seconds, self._output = sample.wall_s, sample.output
                del sample
            self.calls = max(1, min(1000, round(min_sample_ms / 1e3 / max(seconds, 1e-7))))
            self.row = replace(self.row, calls_per_round=self.calls)
        except Exception as error:
            self.fail(error)

    def take_sample(self, timer: Timer) -> None:
        """Its turn in a round."""
        assert self._prepared is not None
        try:
            sample = timer.sample(self._prepared.run, self.calls)
            parts = self._prepared.parts(sample.output) if self._prepared.parts is not None else {}
            self._output = sample.output
            self.samples.append((sample._replace(output=None), parts))
        except Exception as error:
            self.fail(error)

    def count_energy(self, meter: EnergyMeter) -> None:
        """Joules a call."""
        assert self._prepared is not None
        try:
            self.row = replace(self.row, energy_j=meter.per_call(self._prepared.run))
        except Exception as error:
            self.fail(error)

    def verify(self, check: Check | None) -> None:
        """Check the last output; keep the worse of this and an earlier figure."""
        if check is None or not self.active:
            return
        assert self._prepared is not None
        make = self._prepared.answer
        try:
            figure = check(self.contender, self._output if make is None else make(self._output))
        except Exception as error:
            if isinstance(error, FailedError | MissingError) or is_out_of_memory(error):
                self.fail(error)
            else:
                self._discard("wrong", f"wrong answer: {describe(error).removeprefix('ValueError: ')}")
            return
        before = self.row.parity
        if before is None or not figure.relative_error <= before.relative_error:
            self.row = replace(self.row, parity=figure)
        if not figure.passed:
            self._discard("wrong", f"wrong answer: {figure}")

    def fail(self, error: Exception) -> None:
        """It is missing something, crashed, or ran out of memory."""
        self._discard("missing" if isinstance(error, MissingError) else "failed", describe(error))

    def finished_row(self, stopped: Stopped) -> Row:
        """The row with its times, still without ratios."""
        if self.active and not self.samples:
            return replace(self.row, status="missing", reason=_NOT_REACHED)
        if not self.active:
            return self.row
        parts: dict[str, list[float]] = {}
        for _, each in self.samples:
            for name, values in each.items():
                parts.setdefault(name, []).extend(values)
        samples = [sample for sample, _ in self.samples]
        return replace(
            self.row,
            wall_ms=self.walls,
            cpu_ms=tuple(each.cpu_s * 1e3 / self.calls for each in samples),
            device_ms=tuple(
                each.device_s * 1e3 / self.calls for each in samples if each.device_s is not None
            ),
            parts_ms={name: tuple(values) for name, values in parts.items()},
            stopped=stopped,
        )

    def _record(self, peak: Memory, prepared: Prepared) -> None:
        if prepared.held is not None:
            peak = peak + prepared.held
        host = peak.host_bytes
        if isinstance(prepared.run, SelfTimed):
            host = prepared.run.peak_host_bytes
        self.row = replace(self.row, peak_host_bytes=host, peak_device_bytes=peak.device_bytes)

    def _discard(self, status: Any, reason: str) -> None:
        """No time of it is shown."""
        self.row = replace(self.row, status=status, reason=reason)
        self.samples, self._output = [], None
