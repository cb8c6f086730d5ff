"""What verify found: every comparison, the cases that do not apply, where the first difference appears."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.report import format_table

__all__ = ["CaseResult", "NotApplicable", "VerificationError", "VerificationReport"]


@dataclass(frozen=True)
class CaseResult:
    """One output of one batch. `error` and `tolerance` are relative to the reference's largest value,
    `scale`; `note` says what else is wrong: the call failed, the output is missing or of another shape.
    """

    case: str
    output: str
    error: float
    tolerance: float
    scale: float
    finite: bool
    note: str = ""

    @property
    def passed(self) -> bool:
        return self.finite and self.error <= self.tolerance


@dataclass(frozen=True)
class NotApplicable:
    """A case that was not run, and why."""

    case: str
    reason: str


@dataclass
class VerificationReport:
    """Every comparison made, the worst first to be named.

    Attributes:
        results: one entry an output and case.
        not_applicable: cases this model cannot be put to, with the reason.
        first_difference: where the worst case's error first appears; empty where everything passed.
    """

    results: list[CaseResult] = field(default_factory=list)
    not_applicable: list[NotApplicable] = field(default_factory=list)
    first_difference: str = ""

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def worst(self) -> CaseResult:
        return max(
            self.results,
            key=lambda result: (not result.finite, result.error / max(result.tolerance, 1e-30)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values; a figure JSON cannot hold (infinite or not a number) is a string."""
        rows = [{**_plain(asdict(result)), "passed": result.passed} for result in self.results]
        return {
            "passed": self.passed,
            "results": rows,
            "not_applicable": [asdict(each) for each in self.not_applicable],
            "first_difference": self.first_difference,
        }

    def table(self) -> str:
        """Every comparison, then every case that does not apply, then where a difference first appears."""
        rows = [
            (
                result.case,
                result.output,
                f"{result.error:.1e}",
                f"{result.tolerance:.1e}",
                _verdict(result),
            )
            for result in self.results
        ]
        parts = [format_table(("case", "output", "error", "tolerance", "result"), rows)]
        if self.not_applicable:
            reasons = [(each.case, each.reason) for each in self.not_applicable]
            parts.append(format_table(("not applicable", "reason"), reasons))
        if self.first_difference:
            parts.append(f"{self.worst.case}: {self.first_difference}")
        return "\n\n".join(parts)


class VerificationError(AssertionError):
    """The model differs from its reference; `report` holds every comparison."""

    def __init__(self, report: VerificationReport) -> None:
        self.report = report
        worst = report.worst
        found = f"error {worst.error:.2e}" if worst.finite else "values that are not finite"
        message = (
            f"{worst.case}: {worst.output} has {found}, "
            f"accepted is {worst.tolerance:.2e} of the scale {worst.scale:.3g}"
        )
        if worst.note:
            message = f"{worst.case}: {worst.output} {worst.note}"
        super().__init__(f"{message}; {report.first_difference}" if report.first_difference else message)


def _verdict(result: CaseResult) -> str:
    if result.passed:
        return "ok"
    if result.note:
        return f"FAILED: {result.output} {result.note}"
    return "FAILED" if result.finite else "NOT FINITE"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
