"""Timing: contenders interleaved in one process, each checked for parity before and after it is timed.

    rows = measure([Contender("SDPA", run_sdpa), Contender("ours", run_ours)], check=check, budget_s=5)

A contender that cannot be prepared, crashes or gives a wrong answer is a row with its reason; the rest go on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Protocol

from tqdm import tqdm

from fastattn.bench.parity import Parity
from fastattn.bench.rows import Row, with_ratios

__all__ = ["Check", "Contender", "MissingError", "Timer", "measure"]


class MissingError(RuntimeError):
    """What a contender needs is not on this machine; raised by its `prepare`. The row says "missing: ..."."""


@dataclass(frozen=True)
class Contender:
    """One way of computing the same thing.

    Attributes:
        name: unique among the contenders measured together.
        run: computes it once and returns the output.
        prepare: makes `run`, where making it may fail (compiling, exporting); give one of the two.
        dtype: the precision it computes in, for the table.
        against: name of a further contender to give a ratio over, beside the baseline.
        highlight: whether it is drawn as ours.
    """

    name: str
    run: Callable[[], Any] | None = None
    prepare: Callable[[], Callable[[], Any]] | None = None
    dtype: str = "fp32"
    against: str | None = None
    highlight: bool = False

    def __post_init__(self) -> None:
        if (self.run is None) == (self.prepare is None):
            raise ValueError(f"contender {self.name!r} needs either run or prepare")


Check = Callable[[Contender, Any], Parity]


class Timer(Protocol):
    """Times calls; the seam for a fake clock."""

    def now(self) -> float:
        """Seconds on the wall clock."""
        ...

    def sample(self, run: Callable[[], Any], calls: int) -> tuple[float, float, float | None, Any]:
        """Wall, processor and device seconds of `calls` calls together, and the last output."""
        ...


class CpuTimer:
    """perf_counter for wall time, process_time for the processor time of all threads."""

    # Worker threads spin after a call, on cores the next contender needs: ONNX Runtime's for 18 to 40 ms of
    # processor time, OpenMP's for 5 to 8 (measured on two cores). A sample begins when the process is idle.
    settle_step_s, settle_limit_s, idle_share = 0.005, 0.25, 0.1

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, run: Callable[[], Any], calls: int) -> tuple[float, float, float | None, Any]:
        self._settle()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            output = run()
        return time.perf_counter() - wall, time.process_time() - cpu, None, output

    def _settle(self) -> None:
        for _ in range(round(self.settle_limit_s / self.settle_step_s)):
            cpu = time.process_time()
            time.sleep(self.settle_step_s)
            if time.process_time() - cpu < self.idle_share * self.settle_step_s:
                return


class CudaTimer:
    """Wall time from an idle device to an idle device; device time between events around the same calls."""

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, run: Callable[[], Any], calls: int) -> tuple[float, float, float | None, Any]:
        import torch

        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda.synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        start.record()
        for _ in range(calls):
            output = run()
        end.record()
        torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return wall, cpu, start.elapsed_time(end) / 1e3, output


@dataclass
class _Entry:
    """A contender while it is measured."""

    contender: Contender
    run: Callable[[], Any]
    row: Row
    calls: int = 1
    samples: list[tuple[float, float, float | None]] = field(default_factory=list)
    output: Any = None

    @property
    def active(self) -> bool:
        return self.row.status == "measured"

    def fail(self, error: Exception) -> None:
        missing = isinstance(error, MissingError)
        reason = f"missing: {error}" if missing else f"{type(error).__name__}: {_first_line(error)}"
        self.row = replace(self.row, status="missing" if missing else "failed", reason=reason)
        self.samples, self.output = [], None

    def verify(self, check: Check | None) -> None:
        """Check the last output; keep the worse of this and an earlier figure."""
        if check is None or not self.active:
            return
        try:
            figure = check(self.contender, self.output)
        except Exception as error:
            self.row = replace(self.row, status="wrong", reason=f"wrong answer: {_first_line(error)}")
            self.samples = []
            return
        before = self.row.parity
        if before is None or not figure.relative_error <= before.relative_error:
            self.row = replace(self.row, parity=figure)
        if not figure.passed:
            self.row = replace(self.row, status="wrong", reason=f"wrong answer: {figure}")
            self.samples = []


def measure(
    contenders: Sequence[Contender],
    *,
    check: Check | None = None,
    baseline: str | Sequence[str] | None = None,
    device: str = "cpu",
    budget_s: float = 10.0,
    min_rounds: int = 7,
    max_rounds: int = 200,
    warmup: int = 2,
    min_sample_ms: float = 2.0,
    progress: bool = False,
    label: str = "",
    timer: Timer | None = None,
) -> list[Row]:
    """Time contenders against each other: one call of each a round, in an order that rotates and turns round.

    Args:
        contenders: what to time; names must differ.
        check: gives a contender's parity from its output; called before and after timing. Without it no ratio
            is shown.
        baseline: what ratios are over: a name, or several of which the fastest is taken.
            The first contender if None.
        device: "cpu" or "cuda"; chooses the clock.
        budget_s: rounds stop when the next would end after this many seconds; preparation and warm-up are not
            counted.
        min_rounds, max_rounds: bounds on the number of rounds, whatever the budget. An interval takes five.
        warmup: calls of each contender before timing, the first included.
        min_sample_ms: a faster contender is called several times a round, and the time divided.
        progress: show a bar on stderr (where that is a terminal).
        label: the bar's text.
        timer: replaces the clock.

    Returns:
        One row a contender, in the order given.

    Raises:
        ValueError: two contenders have one name, or baseline names none of them.

    Example:
        >>> rows = measure([Contender("a", lambda: sum(range(100)))], budget_s=0.01)
        >>> rows[0].status, rows[0].ratio
        ('measured', None)
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"two contenders have the same name: {', '.join(names)}")
    candidates = (
        names[:1] if baseline is None else [baseline] if isinstance(baseline, str) else list(baseline)
    )
    if unknown := [name for name in candidates if name not in names]:
        raise ValueError(f"baseline {unknown[0]!r} is not among the contenders: {', '.join(names)}")
    timer = timer or (CudaTimer() if device.startswith("cuda") else CpuTimer())

    bar = tqdm(
        total=len(contenders) + min_rounds,
        desc=label,
        disable=None if progress else True,
        leave=False,
        unit="",
    )
    with bar:
        entries = []
        for contender in contenders:
            bar.set_postfix_str(f"preparing {contender.name}")
            entries.append(_prepare(contender, timer, check, max(1, warmup), min_sample_ms))
            bar.update()
        bar.set_postfix_str("")
        _rounds(entries, timer, budget_s, min_rounds, max_rounds, bar)
    for entry in entries:
        entry.verify(check)
    return _rows(entries, candidates)


def _prepare(
    contender: Contender, timer: Timer, check: Check | None, warmup: int, min_sample_ms: float
) -> _Entry:
    """Make the contender ready: first call, parity, warm-up, and how many calls make a sample."""
    row = Row(contender.name, contender.dtype, "measured", highlight=contender.highlight)
    entry = _Entry(contender, contender.run or (lambda: None), row)
    try:
        if contender.prepare is not None:
            entry.run = contender.prepare()
        seconds, _, _, entry.output = timer.sample(entry.run, 1)
        entry.row = replace(row, first_call_ms=seconds * 1e3)
        entry.verify(check)
        if entry.active:
            for _ in range(warmup - 1):
                seconds, *_ = timer.sample(entry.run, 1)
            entry.calls = max(1, min(1000, round(min_sample_ms / 1e3 / max(seconds, 1e-7))))
            entry.row = replace(entry.row, calls_per_round=entry.calls)
    except Exception as error:
        entry.fail(error)
    return entry


def _rounds(
    entries: list[_Entry], timer: Timer, budget_s: float, min_rounds: int, max_rounds: int, bar: tqdm
) -> None:
    begin = timer.now()
    for index in range(max_rounds):
        active = [entry for entry in entries if entry.active]
        if not active:
            return
        start = timer.now()
        for entry in _order(active, index):
            try:
                wall, cpu, device, entry.output = timer.sample(entry.run, entry.calls)
                entry.samples.append((wall, cpu, device))
            except Exception as error:
                entry.fail(error)
        end = timer.now()
        rounds_left = min(max_rounds - index - 1, int((begin + budget_s - end) / max(end - start, 1e-9)))
        bar.total = len(entries) + index + 1 + max(rounds_left, min_rounds - index - 1, 0)
        bar.update()
        if index + 1 >= min_rounds and rounds_left < 1:
            return


def _order(entries: list[_Entry], index: int) -> list[_Entry]:
    """The order of a round: who goes first rotates; every other one runs backwards: neighbours change too."""
    shift = index % len(entries)
    order = entries[shift:] + entries[:shift]
    return order[::-1] if index % 2 else order


def _rows(entries: list[_Entry], candidates: list[str]) -> list[Row]:
    rows = {}
    for entry in entries:
        walls, cpus, devices = zip(*entry.samples, strict=True) if entry.samples else ((), (), ())
        rows[entry.row.name] = replace(
            entry.row,
            wall_ms=tuple(wall * 1e3 / entry.calls for wall in walls),
            cpu_ms=tuple(cpu * 1e3 / entry.calls for cpu in cpus),
            device_ms=tuple(device * 1e3 / entry.calls for device in devices if device is not None),
        )
    trusted = [rows[name] for name in candidates if rows[name].wall_ms]
    baseline = reduce(_faster, trusted) if trusted else None
    return [with_ratios(rows[e.row.name], baseline, rows.get(e.contender.against or "")) for e in entries]


def _faster(row: Row, other: Row) -> Row:
    """The faster of two by their paired rounds, as ratios are: no candidate then has a ratio above 1."""
    quotients = [mine / its for mine, its in zip(row.wall_ms, other.wall_ms, strict=True)]
    return other if statistics.median(quotients) > 1 else row


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    return text if len(text) <= 160 else f"{text[:157]}..."
