"""How much faster, and how sure: the ratio of two contenders over paired rounds with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

__all__ = ["LEVEL", "METHOD", "MINIMUM_ROUNDS", "Ratio", "paired_ratio"]

LEVEL = 0.95
METHOD = (
    "ratio: median over rounds of baseline time / contender time, both of the same round; interval: "
    "percentile bootstrap over rounds, 4,000 resamples, 95%, fixed seed"
)
_RESAMPLES = 4000
# With fewer rounds the percentile interval of a median cannot reach its nominal level: five give 94% at most.
MINIMUM_ROUNDS = 5


@dataclass(frozen=True)
class Ratio:
    """Baseline time over contender time: above 1 the contender is faster.

    Attributes:
        value: the median over rounds.
        low, high: the ends of its 95% confidence interval.
        baseline: the name of the contender it is measured against.
        rounds: how many paired rounds it rests on.
    """

    value: float
    low: float
    high: float
    baseline: str
    rounds: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values, with the level."""
        return {**asdict(self), "level": LEVEL}

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


def paired_ratio(baseline_ms: Sequence[float], contender_ms: Sequence[float], baseline: str) -> Ratio | None:
    """The ratio of two contenders timed in the same rounds, or None with fewer than five rounds.

    Rounds are paired because a shared machine's speed drifts by far more than the difference looked for: both
    times of one round see the same drift, so it cancels in their quotient (percentile bootstrap: Efron and
    Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13).

    Args:
        baseline_ms, contender_ms: times of the same rounds, in the same order, in the same unit.
        baseline: the baseline's name.

    Raises:
        ValueError: the two do not have the same number of rounds.

    Example:
        >>> paired_ratio([2.0] * 8, [1.0] * 8, "SDPA")
        Ratio(value=2.0, low=2.0, high=2.0, baseline='SDPA', rounds=8)
    """
    if len(baseline_ms) != len(contender_ms):
        raise ValueError(
            f"{len(baseline_ms)} rounds of the baseline against {len(contender_ms)} of the contender"
        )
    if len(baseline_ms) < MINIMUM_ROUNDS:
        return None
    quotients = np.asarray(baseline_ms, dtype=np.float64) / np.asarray(contender_ms, dtype=np.float64)
    picks = np.random.default_rng(0).integers(0, len(quotients), size=(_RESAMPLES, len(quotients)))
    medians = np.median(quotients[picks], axis=1)
    low, high = np.quantile(medians, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Ratio(float(np.median(quotients)), float(low), float(high), baseline, len(quotients))
