"""Interleaving, budgets, and what becomes of contenders that are missing, crash or are wrong."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from fastattn.bench import Contender, MissingError, Parity, measure
from fastattn.bench.rows import Row

NewTimer = Callable[[], Any]


def right(contender: Contender, output: Any) -> Parity:
    return Parity(max_abs_error=1e-7, scale=1.0, tolerance=1e-4)


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_every_round_runs_every_contender_once_and_the_order_changes(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [timer.contender(name, 0.1) for name in "abc"]
    measure(contenders, check=right, budget_s=0, min_rounds=6, warmup=1, timer=timer)
    rounds = ["".join(timer.calls[3 + 3 * index : 6 + 3 * index]) for index in range(6)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    # Everyone goes first, and everyone follows each of the others at times.
    assert {each[0] for each in rounds} == {"a", "b", "c"}
    pairs = {each[index : index + 2] for each in rounds for index in range(2)}
    assert pairs == {"ab", "bc", "ca", "ba", "cb", "ac"}


def test_rounds_fill_the_budget_and_no_more(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = measure([timer.contender("a", 0.5), timer.contender("b", 0.5)], budget_s=20, timer=timer)
    assert [len(row.wall_ms) for row in rows] == [20, 20]


def test_the_fewest_rounds_are_kept_when_the_budget_is_too_small(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = measure([timer.contender("slow", 100.0)], budget_s=1, min_rounds=7, timer=timer)
    assert len(rows[0].wall_ms) == 7


def test_times_are_a_call_and_the_processor_time_stands_beside_them(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = measure([timer.contender("quick", 0.0001)], budget_s=0, min_sample_ms=2.0, timer=timer)
    assert rows[0].calls_per_round == 20
    assert rows[0].median_ms == pytest.approx(0.1)
    assert rows[0].cpu_median_ms == pytest.approx(0.2)


def test_minimum_median_and_ratio_of_known_times(new_timer: NewTimer) -> None:
    timer = new_timer()
    # The first two calls are warm-up.
    slow = timer.contender("slow", 9.0, 9.0, 4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 8.0)
    fast = timer.contender("fast", 9.0, 9.0, 2.0, 2.0, 4.0, 4.0, 2.0, 2.0, 4.0)
    rows = by_name(measure([slow, fast], check=right, budget_s=0, min_rounds=7, timer=timer))
    assert (rows["fast"].min_ms, rows["fast"].median_ms) == (2000.0, 2000.0)
    assert rows["slow"].baseline and rows["slow"].ratio is None
    # Both slow down in the same rounds: the ratio of paired rounds does not move.
    ratio = rows["fast"].ratio
    assert ratio is not None and (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.baseline == "slow"


def test_the_baseline_is_the_faster_candidate(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [timer.contender("eager", 2.0), timer.contender("sdpa", 1.5), timer.contender("ours", 0.5)]
    rows = by_name(measure(contenders, check=right, baseline=["eager", "sdpa"], budget_s=0, timer=timer))
    assert rows["sdpa"].baseline and not rows["eager"].baseline
    assert rows["ours"].ratio is not None and rows["ours"].ratio.value == pytest.approx(3.0)
    assert rows["eager"].ratio is not None and rows["eager"].ratio.value == pytest.approx(0.75)


def test_a_second_ratio_over_a_named_contender(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [
        timer.contender("fp32", 4.0),
        timer.contender("bf16", 2.0),
        timer.contender("ours", 1.0, against="bf16"),
    ]
    ours = by_name(measure(contenders, check=right, budget_s=0, timer=timer))["ours"]
    assert ours.ratio is not None and ours.ratio.value == pytest.approx(4.0)
    assert ours.against_ratio is not None and ours.against_ratio.value == pytest.approx(2.0)
    assert ours.against_ratio.baseline == "bf16"


def test_no_ratio_without_a_parity_check(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = by_name(measure([timer.contender("a", 2.0), timer.contender("b", 1.0)], budget_s=0, timer=timer))
    assert rows["b"].ratio is None
    assert "parity was not checked" in rows["b"].reason


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_wrong_answer_is_flagged_and_not_timed(error: float, new_timer: NewTimer) -> None:
    def check(contender: Contender, output: Any) -> Parity:
        return Parity(error if contender.name == "wrong" else 0.0, scale=1.0, tolerance=1e-4)

    timer = new_timer()
    contenders = [timer.contender("base", 1.0), timer.contender("wrong", 0.1), timer.contender("ok", 0.5)]
    rows = by_name(measure(contenders, check=check, budget_s=0, timer=timer))
    assert rows["wrong"].status == "wrong" and "wrong answer" in rows["wrong"].reason
    assert rows["wrong"].ratio is None and rows["wrong"].median_ms is None
    assert timer.calls.count("wrong") == 1
    assert rows["ok"].ratio is not None


def test_an_answer_that_goes_wrong_while_it_is_timed_loses_its_times(new_timer: NewTimer) -> None:
    timer = new_timer()
    calls = Counter[str]()

    def drifting() -> float:
        calls["drifting"] += 1
        timer.seconds += 0.5
        return 0.0 if calls["drifting"] < 5 else 1.0

    def check(contender: Contender, output: Any) -> Parity:
        return Parity(output or 0.0, scale=1.0, tolerance=1e-4)

    contenders = [timer.contender("base", 1.0), Contender("drifting", drifting)]
    row = by_name(measure(contenders, check=check, budget_s=0, timer=timer))["drifting"]
    assert row.status == "wrong" and row.ratio is None and row.wall_ms == ()


def test_a_contender_that_cannot_be_prepared_is_a_row_and_the_rest_go_on(new_timer: NewTimer) -> None:
    def missing() -> Any:
        raise MissingError("C++ compiler")

    def broken() -> Any:
        raise RuntimeError("first line\nsecond line")

    timer = new_timer()
    contenders = [
        Contender("missing", prepare=missing),
        Contender("broken", prepare=broken),
        timer.contender("base", 1.0),
        timer.contender("ok", 0.5),
    ]
    rows = by_name(measure(contenders, check=right, baseline="base", budget_s=0, timer=timer))
    assert (rows["missing"].status, rows["missing"].reason) == ("missing", "missing: C++ compiler")
    assert (rows["broken"].status, rows["broken"].reason) == ("failed", "RuntimeError: first line")
    assert rows["ok"].ratio is not None


def test_a_contender_that_crashes_midway_is_a_row_and_the_rest_go_on(new_timer: NewTimer) -> None:
    timer = new_timer()
    calls = Counter[str]()

    def crashing() -> None:
        calls["crashing"] += 1
        if calls["crashing"] > 4:
            raise MemoryError("out of memory")

    contenders = [timer.contender("base", 1.0), Contender("crashing", crashing), timer.contender("ok", 0.5)]
    rows = by_name(measure(contenders, check=right, budget_s=0, timer=timer))
    assert rows["crashing"].status == "failed" and "out of memory" in rows["crashing"].reason
    assert rows["crashing"].wall_ms == () and rows["crashing"].ratio is None
    assert rows["ok"].ratio is not None and rows["ok"].ratio.rounds == 7


def test_without_a_baseline_there_are_times_and_no_ratios(new_timer: NewTimer) -> None:
    def broken() -> Any:
        raise RuntimeError("no")

    timer = new_timer()
    rows = by_name(
        measure(
            [Contender("base", prepare=broken), timer.contender("a", 1.0)],
            check=right,
            budget_s=0,
            timer=timer,
        )
    )
    assert rows["a"].median_ms == 1000.0 and rows["a"].ratio is None
    assert "baseline was not measured" in rows["a"].reason


def test_wrong_use_is_refused_before_anything_runs(new_timer: NewTimer) -> None:
    timer = new_timer()
    twins = [timer.contender("a", 1.0), timer.contender("a", 1.0)]
    with pytest.raises(ValueError, match="same name"):
        measure(twins, timer=timer)
    with pytest.raises(ValueError, match="'c' is not among the contenders: a, b"):
        measure([timer.contender("a", 1.0), timer.contender("b", 1.0)], baseline="c", timer=timer)
    with pytest.raises(ValueError, match="run or prepare"):
        Contender("neither")
    assert timer.calls == []


def test_a_contender_slower_by_a_tenth_is_ranked_slower_on_a_noisy_clock(new_timer: NewTimer) -> None:
    """The machine's speed drifts by a factor of two; single calls jitter by 5%. Seeds 0 to 199."""
    ranked = 0
    for seed in range(200):
        noise, timer = random.Random(seed), new_timer()

        def run(cost_s: float, noise: random.Random = noise, timer: Any = timer) -> None:
            drift = 1.5 + 0.5 * (timer.seconds // 8 % 2)
            timer.seconds += cost_s * drift * noise.lognormvariate(0, 0.05)

        contenders = [Contender("base", lambda: run(1.0)), Contender("slower", lambda: run(1.1))]
        rows = measure(contenders, check=right, budget_s=60, min_rounds=15, timer=timer)
        ratio = rows[1].ratio
        assert ratio is not None
        ranked += ratio.value < 1
    assert ranked >= 190


def test_a_real_clock_sees_work() -> None:
    def work() -> int:
        return sum(range(200_000))

    row = measure([Contender("work", work)], budget_s=0.2)[0]
    assert row.min_ms is not None and row.median_ms is not None
    assert 0 < row.min_ms <= row.median_ms
    assert row.cpu_median_ms is not None and row.cpu_median_ms > 0


def test_a_contender_does_not_pay_for_threads_that_the_one_before_left_spinning() -> None:
    """As ONNX Runtime's do: they work on for tens of milliseconds after its call has returned."""

    def spin() -> None:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass

    def leaves_a_thread_spinning() -> None:
        threading.Thread(target=spin).start()

    # A contender that waits has no processor time of its own.
    contenders = [Contender("spins", leaves_a_thread_spinning), Contender("waits", lambda: time.sleep(0.01))]
    waits = by_name(measure(contenders, budget_s=0, min_rounds=9))["waits"]
    assert waits.cpu_median_ms is not None and waits.cpu_median_ms < 2.0
