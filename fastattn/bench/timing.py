"""Timing: contenders interleaved in one process, each checked for parity before and after it is timed.

    rows = measure([Contender("SDPA", run_sdpa), Contender("ours", run_ours)], check=check, budget_s=5)

A contender that cannot be prepared, crashes, runs out of memory or gives a wrong answer is a row with its
reason; the rest go on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from functools import reduce

from tqdm import tqdm

from fastattn.bench.contender import Contender, MissingError, Prepared, describe
from fastattn.bench.energy import EnergyMeter
from fastattn.bench.memory import MemoryMeter, memory_limit
from fastattn.bench.process import frozen_heap
from fastattn.bench.ratio import MINIMUM_ROUNDS, paired_ratio
from fastattn.bench.rows import Row, Stopped, with_ratios
from fastattn.bench.timers import CpuTimer, CudaTimer, Timer
from fastattn.bench.trial import Check, Trial

__all__ = ["Check", "Contender", "Interrupted", "MissingError", "Prepared", "Timer", "describe", "measure"]

# Rounds between two looks at the intervals grow by this much: every look is one more chance to stop on an
# interval that is narrow by luck. So few leave it holding the true ratio in 92 to 95% of simulated runs.
_LOOKS_GROW = 1.4


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while `measure` ran; `rows` is what it would have returned, of the rounds that were complete."""

    def __init__(self, rows: Sequence[Row]) -> None:
        super().__init__("interrupted while measuring")
        self.rows = tuple(rows)


def measure(
    contenders: Sequence[Contender],
    *,
    check: Check | None = None,
    baseline: str | Sequence[str] | None = None,
    device: str = "cpu",
    budget_s: float = 10.0,
    min_rounds: int = 7,
    max_rounds: int = 200,
    until: float | None = None,
    warmup: int = 2,
    min_sample_ms: float = 2.0,
    resources: bool = True,
    progress: bool = False,
    label: str = "",
    timer: Timer | None = None,
) -> list[Row]:
    """Time contenders against each other: one call of each a round, in an order that rotates and turns round.

    Args:
        contenders: what to time; names must differ.
        check: gives a contender's parity from its answer; called before and after timing. Without it no ratio
            is shown.
        baseline: what ratios are over: a name, or several of which the fastest is taken.
            The first contender if None.
        device: "cpu" or "cuda"; chooses the clock.
        budget_s: rounds stop when the next would end after this many seconds; preparation and warm-up are not
            counted.
        min_rounds, max_rounds: bounds on the number of rounds, whatever the budget. An interval takes six.
        until: rounds stop, too, when the 95% interval of every ratio, over the baseline and over `against`,
            is within this part of its value to either side: 0.02 for ratios known to 2%. None uses the
            whole budget.
        warmup: calls of each contender before timing, the first included.
        min_sample_ms: a faster contender is called several times a round, and the time divided.
        resources: tell peak memory, from the last warm-up call (the second at the earliest), and on a GPU
            that counts it energy, from a second of calls after the rounds.
        progress: show a bar on stderr (where that is a terminal).
        label: the bar's text.
        timer: replaces the clock.

    Returns:
        One row a contender, in the order given.

    Raises:
        Interrupted: Ctrl-C was pressed; it carries the rows measured so far.
        ValueError: two contenders have one name, baseline names none of them, or until is no fraction.

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
    if until is not None and not 0 < until < 1:
        raise ValueError(f"until is {until!r}; it must be above 0 and below 1, such as 0.02 for 2%, or None")
    timer = timer or (CudaTimer() if device.startswith("cuda") else CpuTimer())

    trials = [Trial(contender) for contender in contenders]
    bar = tqdm(
        total=len(contenders) + min_rounds,
        desc=label,
        disable=None if progress else True,
        leave=False,
        unit="",
    )
    try:
        with frozen_heap() if resources else nullcontext(), bar:
            for trial in trials:
                bar.set_postfix_str(f"preparing {trial.contender.name}")
                meter = MemoryMeter(device) if resources else None
                with memory_limit():
                    trial.prepare(timer, check, max(1, warmup), min_sample_ms, meter)
                bar.update()
            bar.set_postfix_str("")
            with memory_limit():
                stopped = _rounds(trials, candidates, timer, budget_s, min_rounds, max_rounds, until, bar)
                for trial in trials:
                    trial.verify(check)
        if resources:
            _count_energy(trials, device)
    except KeyboardInterrupt:
        # Rounds are paired: what the last one had not come to is left out, unless it was the first.
        complete = min((len(trial.samples) for trial in trials if trial.active), default=0)
        for trial in trials:
            del trial.samples[complete or 1 :]
        raise Interrupted(_rows(trials, candidates, "interrupted")) from None
    return _rows(trials, candidates, stopped)


def _rounds(
    trials: list[Trial],
    candidates: Sequence[str],
    timer: Timer,
    budget_s: float,
    min_rounds: int,
    max_rounds: int,
    until: float | None,
    bar: tqdm,
) -> Stopped:
    begin = timer.now()
    look = max(min_rounds, MINIMUM_ROUNDS)
    for index in range(max_rounds):
        active = [trial for trial in trials if trial.active]
        if not active:
            break
        start = timer.now()
        for trial in _order(active, index):
            trial.take_sample(timer)
        end = timer.now()
        rounds_left = min(max_rounds - index - 1, int((begin + budget_s - end) / max(end - start, 1e-9)))
        bar.total = len(trials) + index + 1 + max(rounds_left, min_rounds - index - 1, 0)
        bar.update()
        if until is not None and index + 1 >= look:
            look = math.ceil(look * _LOOKS_GROW)
            if _known_to(until, trials, candidates):
                return "precision"
        if index + 1 >= min_rounds and rounds_left < 1:
            return "rounds" if index + 1 == max_rounds else "budget"
    return "rounds"


def _order(trials: list[Trial], index: int) -> list[Trial]:
    """The order of a round: every other one is the one before it backwards, so that a steady drift favours
    nobody; who begins rotates, and neighbours change.
    """
    shift = index // 2 % len(trials)
    order = trials[shift:] + trials[:shift]
    return order[::-1] if index % 2 else order


def _known_to(until: float, trials: Sequence[Trial], candidates: Sequence[str]) -> bool:
    """Whether there are ratios, and every one's interval is narrow enough."""
    walls = {trial.contender.name: trial.walls for trial in trials if trial.active}
    baseline = _fastest(walls, candidates)
    pairs = {(baseline, name) for name in walls}
    pairs |= {(trial.contender.against, trial.contender.name) for trial in trials if trial.active}
    ratios = [
        paired_ratio(walls[over], walls[name], over)
        for over, name in pairs
        if over is not None and over != name and over in walls
    ]
    return bool(ratios) and all(ratio is not None and ratio.precision <= until for ratio in ratios)


def _fastest(walls: dict[str, tuple[float, ...]], candidates: Sequence[str]) -> str | None:
    """The fastest candidate by paired rounds, as ratios are: no candidate then has a ratio above 1."""

    def faster(one: str, other: str) -> str:
        quotients = [mine / its for mine, its in zip(walls[one], walls[other], strict=True)]
        return other if statistics.median(quotients) > 1 else one

    timed = [name for name in candidates if walls.get(name)]
    return reduce(faster, timed) if timed else None


def _count_energy(trials: Sequence[Trial], device: str) -> None:
    with EnergyMeter.open(device) as meter:
        for trial in trials:
            if meter is not None and trial.active:
                trial.count_energy(meter)


def _rows(trials: Sequence[Trial], candidates: Sequence[str], stopped: Stopped) -> list[Row]:
    rows = {trial.contender.name: trial.finished_row(stopped) for trial in trials}
    fastest = _fastest({name: row.wall_ms for name, row in rows.items()}, candidates)
    baseline = None if fastest is None else rows[fastest]
    return [
        with_ratios(rows[trial.contender.name], baseline, rows.get(trial.contender.against or ""))
        for trial in trials
    ]
