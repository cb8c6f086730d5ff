"""One question at a time, each measured by the interleaved harness with parity beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tqdm import tqdm

from fastattn.bench.parity import FP32_TOLERANCE, Parity, compare
from fastattn.bench.rows import Row
from fastattn.bench.timing import Contender
from fastattn.tuning.outcome import Comparison

__all__ = ["Measure", "Trials", "fastest", "is_faster"]

# A ratio known to 2% is known well enough to choose by.
_KNOWN = 0.02

Choose = Callable[[list[Row]], str]


class Measure(Protocol):
    """`fastattn.bench.measure`, or what takes its place."""

    def __call__(
        self,
        contenders: Sequence[Contender],
        *,
        check: Callable[[Contender, Any], Parity],
        device: str,
        budget_s: float,
        until: float,
        resources: bool,
    ) -> list[Row]: ...


@dataclass
class Trials:
    """What the questions of one tuning share.

    Attributes:
        measure: times contenders.
        device: "cpu" or "cuda".
        bar: moves on by one a comparison.
        comparisons: what was asked so far.
    """

    measure: Measure
    device: str
    bar: tqdm
    comparisons: list[Comparison] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        """The precision models mostly run in on this device."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def tolerance(self) -> float:
        """Largest error of an output, of its scale, between two ways of computing it in `dtype`."""
        return FP32_TOLERANCE if self.dtype == torch.float32 else 8 * torch.finfo(self.dtype).eps

    def ask(
        self,
        question: str,
        case: str,
        contenders: Sequence[Contender],
        choose: Choose,
        budget_s: float,
        check: Callable[[Contender, Any], Parity] | None = None,
    ) -> list[Row]:
        """Measure `contenders` for about `budget_s` seconds, keep the comparison, and return its rows.

        Args:
            question, case: as `Comparison` has them.
            contenders: the first is what the others are compared with, in time and, without a `check`, in
                their outputs.
            choose: the name of the contender to use, from the rows.
            budget_s: seconds of timing, warm-up not counted.
            check: gives parity from a contender and its output.
        """
        self.bar.set_postfix_str(f"{question}: {case}")
        expected: list[Any] = []

        def agrees(_: Contender, output: Any) -> Parity:
            # The first to be called is the first contender.
            if not expected:
                expected.append(output)
            return compare(expected[0], output, tolerance=self.tolerance)

        with torch.inference_mode():
            rows = self.measure(
                contenders,
                check=check or agrees,
                device=self.device,
                budget_s=budget_s,
                until=_KNOWN,
                resources=False,
            )
        self.comparisons.append(Comparison.of(question, case, choose(rows), rows))
        self.bar.update()
        return rows


def is_faster(row: Row, by: float = 1.0) -> bool:
    """Whether `row` was measured and is surely faster than the first contender: the lower end of the ratio's
    interval is above `by`.
    """
    return row.status == "measured" and row.ratio is not None and row.ratio.low > by


def fastest(rows: list[Row], by: float = 1.0) -> Row:
    """The row with the highest ratio among those surely faster than the first; the first where none is."""
    worth = [row for row in rows[1:] if is_faster(row, by)]
    return max(worth, key=lambda row: row.ratio.value if row.ratio else 0.0, default=rows[0])
