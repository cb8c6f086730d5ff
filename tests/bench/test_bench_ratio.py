"""The confidence interval of a ratio, on timings whose true ratio is known."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn.bench import paired_ratio


def synthetic(seed: int, rounds: int, true_ratio: float) -> tuple[list[float], list[float]]:
    """Rounds of a machine whose speed drifts twofold, with 10% of log-normal jitter on each call."""
    generator = np.random.default_rng(seed)
    drift = np.repeat(generator.uniform(1.0, 2.0, size=rounds), 1)
    base = 100.0 * true_ratio * drift * generator.lognormal(0.0, 0.1, size=rounds)
    return base.tolist(), (100.0 * drift * generator.lognormal(0.0, 0.1, size=rounds)).tolist()


@pytest.mark.parametrize("true_ratio", [0.9, 1.0, 2.1])
def test_the_interval_holds_the_true_ratio_as_often_as_it_says(true_ratio: float) -> None:
    held = 0
    for seed in range(200):
        ratio = paired_ratio(*synthetic(seed, 20, true_ratio), "base")
        assert ratio is not None
        held += ratio.low <= true_ratio <= ratio.high
    assert held >= 0.90 * 200


@pytest.mark.parametrize("rounds", [6, 7, 8, 12, 30])
def test_it_does_so_with_few_rounds_too(rounds: int) -> None:
    """Where a bootstrap of the median falls short: 88% with seven rounds."""
    found = [paired_ratio(*synthetic(seed, rounds, 2.0), "base") for seed in range(1000)]
    held = sum(ratio is not None and ratio.low <= 2.0 <= ratio.high for ratio in found)
    assert 0.93 <= held / len(found) <= 0.98


def test_the_other_way_round_it_is_the_reciprocal() -> None:
    base, contender = synthetic(5, 11, 1.3)
    one, other = paired_ratio(base, contender, "a"), paired_ratio(contender, base, "b")
    assert one is not None and other is not None
    found = (1 / other.value, 1 / other.high, 1 / other.low)
    assert found == pytest.approx((one.value, one.low, one.high))


def test_more_rounds_narrow_the_interval() -> None:
    few = paired_ratio(*synthetic(1, 8, 2.0), "base")
    many = paired_ratio(*synthetic(1, 120, 2.0), "base")
    assert few is not None and many is not None
    assert many.high - many.low < few.high - few.low


def test_one_stalled_round_does_not_move_the_ratio() -> None:
    base, contender = [10.0] * 9, [5.0] * 9
    contender[4] = 500.0
    ratio = paired_ratio(base, contender, "base")
    assert ratio is not None and ratio.value == 2.0


def test_the_same_times_always_give_the_same_interval() -> None:
    times = synthetic(3, 15, 1.5)
    assert paired_ratio(*times, "base") == paired_ratio(*times, "base")


def test_too_few_rounds_give_no_ratio() -> None:
    assert paired_ratio([1.0] * 5, [1.0] * 5, "base") is None
    assert paired_ratio([1.0] * 6, [1.0] * 6, "base") is not None


def test_rounds_must_pair_up() -> None:
    with pytest.raises(ValueError, match="6 rounds of the baseline against 5"):
        paired_ratio([1.0] * 6, [1.0] * 5, "base")
