"""Interleaving, budgets, and what becomes of contenders that are missing, crash or are wrong."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from fastattn.bench import Contender, Interrupted, MissingError, Parity, Prepared, measure
from fastattn.bench.rows import Row, outliers, percentiles

NewTimer = Callable[[], Any]

# A fake clock's contenders take no memory.
fake_measure = partial(measure, budget_s=0, resources=False)


def right(contender: Contender, output: Any) -> Parity:
    return Parity(max_abs_error=1e-7, scale=1.0, tolerance=1e-4)


def by_name(rows: list[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}


def test_every_round_runs_every_contender_once_and_the_order_changes(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [timer.contender(name, 0.1) for name in "abc"]
    fake_measure(contenders, check=right, min_rounds=6, warmup=1, timer=timer)
    rounds = ["".join(timer.calls[3 + 3 * index : 6 + 3 * index]) for index in range(6)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    # Everyone goes first, and everyone follows each of the others at times.
    assert {each[0] for each in rounds} == {"a", "b", "c"}
    pairs = {each[index : index + 2] for each in rounds for index in range(2)}
    assert pairs == {"ab", "bc", "ca", "ba", "cb", "ac"}


def test_rounds_fill_the_budget_and_no_more(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = fake_measure([timer.contender("a", 0.5), timer.contender("b", 0.5)], budget_s=20, timer=timer)
    assert [len(row.wall_ms) for row in rows] == [20, 20]


def test_the_fewest_rounds_are_kept_when_the_budget_is_too_small(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = fake_measure([timer.contender("slow", 100.0)], budget_s=1, min_rounds=7, timer=timer)
    assert len(rows[0].wall_ms) == 7


def test_times_are_a_call_and_the_processor_time_stands_beside_them(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = fake_measure([timer.contender("quick", 0.0001)], min_sample_ms=2.0, timer=timer)
    assert rows[0].calls_per_round == 20
    assert rows[0].median_ms == pytest.approx(0.1)
    assert rows[0].cpu_median_ms == pytest.approx(0.2)


def test_minimum_median_and_ratio_of_known_times(new_timer: NewTimer) -> None:
    timer = new_timer()
    # The first two calls are warm-up.
    slow = timer.contender("slow", 9.0, 9.0, 4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 8.0)
    fast = timer.contender("fast", 9.0, 9.0, 2.0, 2.0, 4.0, 4.0, 2.0, 2.0, 4.0)
    rows = by_name(fake_measure([slow, fast], check=right, min_rounds=7, timer=timer))
    assert (rows["fast"].min_ms, rows["fast"].median_ms) == (2000.0, 2000.0)
    assert rows["slow"].baseline and rows["slow"].ratio is None
    # Both slow down in the same rounds: the ratio of paired rounds does not move.
    ratio = rows["fast"].ratio
    assert ratio is not None and (ratio.value, ratio.low, ratio.high) == (2.0, 2.0, 2.0)
    assert ratio.baseline == "slow"


def test_the_baseline_is_the_faster_candidate(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [timer.contender("eager", 2.0), timer.contender("sdpa", 1.5), timer.contender("ours", 0.5)]
    rows = by_name(fake_measure(contenders, check=right, baseline=["eager", "sdpa"], timer=timer))
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
    ours = by_name(fake_measure(contenders, check=right, timer=timer))["ours"]
    assert ours.ratio is not None and ours.ratio.value == pytest.approx(4.0)
    assert ours.against_ratio is not None and ours.against_ratio.value == pytest.approx(2.0)
    assert ours.against_ratio.baseline == "bf16"


def test_no_ratio_without_a_parity_check(new_timer: NewTimer) -> None:
    timer = new_timer()
    rows = by_name(fake_measure([timer.contender("a", 2.0), timer.contender("b", 1.0)], timer=timer))
    assert rows["b"].ratio is None
    assert "parity was not checked" in rows["b"].reason


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_a_wrong_answer_is_flagged_and_not_timed(error: float, new_timer: NewTimer) -> None:
    def check(contender: Contender, output: Any) -> Parity:
        return Parity(error if contender.name == "wrong" else 0.0, scale=1.0, tolerance=1e-4)

    timer = new_timer()
    contenders = [timer.contender("base", 1.0), timer.contender("wrong", 0.1), timer.contender("ok", 0.5)]
    rows = by_name(fake_measure(contenders, check=check, timer=timer))
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
    row = by_name(fake_measure(contenders, check=check, timer=timer))["drifting"]
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
    rows = by_name(fake_measure(contenders, check=right, baseline="base", timer=timer))
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
    rows = by_name(fake_measure(contenders, check=right, timer=timer))
    assert rows["crashing"].status == "failed" and "out of memory" in rows["crashing"].reason
    assert rows["crashing"].wall_ms == () and rows["crashing"].ratio is None
    assert rows["ok"].ratio is not None and rows["ok"].ratio.rounds == 7


def test_without_a_baseline_there_are_times_and_no_ratios(new_timer: NewTimer) -> None:
    def broken() -> Any:
        raise RuntimeError("no")

    timer = new_timer()
    rows = by_name(
        fake_measure(
            [Contender("base", prepare=broken), timer.contender("a", 1.0)],
            check=right,
            timer=timer,
        )
    )
    assert rows["a"].median_ms == 1000.0 and rows["a"].ratio is None
    assert "baseline was not measured" in rows["a"].reason


def test_wrong_use_is_refused_before_anything_runs(new_timer: NewTimer) -> None:
    timer = new_timer()
    twins = [timer.contender("a", 1.0), timer.contender("a", 1.0)]
    with pytest.raises(ValueError, match="same name"):
        fake_measure(twins, timer=timer)
    with pytest.raises(ValueError, match="'c' is not among the contenders: a, b"):
        fake_measure([timer.contender("a", 1.0), timer.contender("b", 1.0)], baseline="c", timer=timer)
    with pytest.raises(ValueError, match="until is 2; it must be above 0 and below 1"):
        measure([timer.contender("a", 1.0)], until=2, timer=timer)
    with pytest.raises(ValueError, match="run or prepare"):
        Contender("neither")
    assert timer.calls == []


def test_who_goes_first_of_two_changes_too(new_timer: NewTimer) -> None:
    timer = new_timer()
    fake_measure([timer.contender(name, 0.1) for name in "ab"], min_rounds=8, warmup=1, timer=timer)
    rounds = ["".join(timer.calls[2 + 2 * index : 4 + 2 * index]) for index in range(8)]
    assert Counter(rounds) == {"ab": 4, "ba": 4}


def test_what_was_made_once_and_the_first_call_are_apart_from_the_rounds(new_timer: NewTimer) -> None:
    timer = new_timer()
    costs = iter([30.0, 2.0] + [1.0] * 7)

    def prepare() -> Prepared:
        def run() -> list[float]:
            timer.seconds += next(costs)
            return [4.0, 5.0]

        return Prepared(run, {"export": 900.0, "load": 100.0}, parts=lambda out: {"first_ms": out[:1]})

    row = fake_measure([Contender("a", prepare=prepare)], timer=timer)[0]
    assert list(row.stages_ms.items()) == [("export", 900.0), ("load", 100.0)]
    assert row.first_call_ms == 30_000.0 and row.wall_ms == (1000.0,) * 7
    assert row.parts_ms == {"first_ms": (4.0,) * 7}


def test_parity_is_computed_on_the_answer_and_making_it_takes_no_time(new_timer: NewTimer) -> None:
    timer = new_timer()
    seen = []

    def answer(output: int) -> str:
        timer.seconds += 50.0
        return f"answer {output}"

    def check(contender: Contender, found: Any) -> Parity:
        seen.append(found)
        return Parity(0.0, 1.0, 1e-4)

    def run() -> int:
        timer.seconds += 1.0
        return 7

    row = fake_measure(
        [Contender("a", prepare=lambda: Prepared(run, answer=answer))], check=check, timer=timer
    )[0]
    assert seen == ["answer 7"] * 2 and row.wall_ms == (1000.0,) * 7


def test_rounds_stop_when_every_ratio_is_known_well_enough(new_noisy_timer: Callable[[int], Any]) -> None:
    def run(**options: Any) -> list[Row]:
        timer = new_noisy_timer(3)
        contenders = [timer.costing("base", 1.0), timer.costing("ours", 0.5), timer.costing("close", 0.99)]
        contenders[2] = replace(contenders[2], against="ours")
        return fake_measure(contenders, check=right, timer=timer, **options)

    rows = run(budget_s=1e9, until=0.04)
    assert {row.stopped for row in rows} == {"precision"} and 7 <= len(rows[0].wall_ms) < 200
    known = [ratio for row in rows for ratio in (row.ratio, row.against_ratio) if ratio is not None]
    assert len(known) == 3 and all(ratio.precision <= 0.04 for ratio in known)
    finer = run(budget_s=1e9, until=0.02)
    assert len(finer[0].wall_ms) > len(rows[0].wall_ms)
    assert run(budget_s=60, until=0.001)[0].stopped == "budget"
    assert run(budget_s=1e9, until=0.001, max_rounds=12)[0].stopped == "rounds"


def test_with_no_ratio_to_know_the_budget_is_used(new_timer: NewTimer) -> None:
    timer = new_timer()
    row = fake_measure([timer.contender("alone", 0.5)], budget_s=20, until=0.02, timer=timer)[0]
    assert len(row.wall_ms) == 40 and row.stopped == "budget"


def pressing_ctrl_c(timer: Any, name: str, call: int) -> Contender:
    """A contender that is interrupted in the given call, counted from 1."""
    calls = Counter[str]()

    def run() -> None:
        calls[name] += 1
        timer.seconds += 0.5
        if calls[name] == call:
            raise KeyboardInterrupt

    return Contender(name, run)


def test_ctrl_c_in_a_round_keeps_the_rounds_before_it(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [
        timer.contender("base", 1.0),
        pressing_ctrl_c(timer, "interrupted", 2 + 9),
        timer.contender("c", 1.0),
    ]
    with pytest.raises(KeyboardInterrupt) as stopped:
        fake_measure(contenders, check=right, min_rounds=20, timer=timer)
    assert isinstance(stopped.value, Interrupted)
    rows = stopped.value.rows
    # Whole rounds: what the others had done of the ninth is gone.
    assert [(row.status, row.stopped, len(row.wall_ms)) for row in rows] == [
        ("measured", "interrupted", 8)
    ] * 3
    assert rows[1].ratio is not None and rows[1].ratio.value == pytest.approx(2.0)


@pytest.mark.parametrize("call", [1, 2])
def test_ctrl_c_while_preparing_gives_rows_that_were_not_measured(call: int, new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [timer.contender("a", 1.0), pressing_ctrl_c(timer, "b", call), timer.contender("c", 1.0)]
    with pytest.raises(Interrupted) as stopped:
        fake_measure(contenders, check=right, timer=timer)
    for row in stopped.value.rows:
        assert (row.status, row.reason) == ("missing", "interrupted before it was measured")
        assert row.wall_ms == () and row.ratio is None
    assert stopped.value.rows[0].first_call_ms == 1000.0 and "c" not in timer.calls


def test_ctrl_c_in_the_first_round_keeps_what_was_called(new_timer: NewTimer) -> None:
    timer = new_timer()
    contenders = [timer.contender("a", 1.0), pressing_ctrl_c(timer, "b", 3), timer.contender("c", 1.0)]
    with pytest.raises(Interrupted) as stopped:
        fake_measure(contenders, check=right, timer=timer)
    assert [len(row.wall_ms) for row in stopped.value.rows] == [1, 0, 0]
    assert stopped.value.rows[0].baseline


def test_percentiles_are_times_that_were_measured_and_outliers_are_counted() -> None:
    times = [float(value) for value in range(1, 201)]
    assert percentiles(times) == {50: 100.5, 90: 180.0, 99: 198.0} and outliers(times) == 0
    steady = [10.0, 10.1, 9.9, 10.2, 9.8] * 4
    row = Row("a", "fp32", "measured", wall_ms=(*steady, 30.0, 25.0), parts_ms={"first_ms": (1.0, 3.0)})
    assert (row.p50_ms, row.p90_ms, row.p99_ms, row.outliers) == (10.0, 10.2, 30.0, 2)
    saved = row.to_dict()
    assert (saved["p99_ms"], saved["outliers"]) == (30.0, 2) and saved["wall_ms"] == list(row.wall_ms)
    assert saved["parts"] == {"first_ms": {"p50": 2.0, "p90": 3.0, "p99": 3.0, "outliers": 0}}
    assert Row("a", "fp32", "missing").p90_ms is None
    assert json.loads(json.dumps(saved)) == saved
