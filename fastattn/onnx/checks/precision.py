"""What a lower precision loses: a figure of its own beside parity, with a gate for each precision."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.checks.whole_forward import WholeForward
from fastattn.verification import VerificationError, VerificationReport, real_positions
from fastattn.verification.likeness import JUDGED_ROWS, few_columns, gate, likeness
from fastattn.verification.report import CaseResult

__all__ = ["check_precision"]


@dataclass(frozen=True)
class _Figure:
    """One output's likeness to the reference's on one batch, or of few columns on all of them.

    Attributes:
        where: the names of the output and the batch.
        mean, least: of the likeness.
        gate: the mean that must be kept; None for fp32.
        few_rows: how many rows there were, where they are too few to be sure.
    """

    where: str
    mean: float
    least: float
    gate: float | None
    few_rows: int | None = None

    @property
    def passed(self) -> bool:
        # A NaN is not.
        return self.gate is None or self.mean >= self.gate


def check_precision(
    run: WholeForward,
    precision: str,
    reference: nn.Module,
    drawn: Mapping[str, dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """The likeness of every output to the reference's, on batches with and without padding.

    Args:
        drawn: the batches by name; drawn at random if None.

    Of fp32 it is only told (a `reference` of other weights may be any distance away): its gate is parity's.

    Returns:
        "cosine_mean" and "cosine_min" of the worst output and batch, "worst" their names, "gate". An output
        of few columns (labels) has one figure for all batches, as `verification.likeness` says.

    Raises:
        VerificationError: a mean below the gate, or an output that is not finite.
    """
    figures = list(_figures(run, precision, reference, run.drawn() if drawn is None else drawn))
    # NaN is the worst, what fails before what does not.
    worst = min(figures, key=lambda each: (each.passed, -math.inf if math.isnan(each.mean) else each.mean))
    if worst.gate is not None and not worst.passed:
        report = VerificationReport()
        note = f"mean cosine {worst.mean:.5f} with the reference; {precision} must keep {worst.gate}"
        if worst.few_rows is not None:
            note += f" ({worst.few_rows} rows of few columns say little: give larger inputs, or calibration)"
        report.results.append(
            CaseResult(worst.where, "precision", 1.0 - worst.mean, 1.0 - worst.gate, 1.0, False, note)
        )
        raise VerificationError(report)
    return {
        "cosine_mean": worst.mean,
        "cosine_min": worst.least,
        "worst": worst.where,
        "gate": worst.gate,
    }


def _figures(
    run: WholeForward, precision: str, reference: nn.Module, drawn: Mapping[str, dict[str, Tensor]]
) -> Iterator[_Figure]:
    gathered: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    for case, batch in drawn.items():
        mask = batch.get("attention_mask") if "decoder_input_ids" not in batch else None
        answer, right = run.found(batch), run.expected(reference, batch)
        for name, value in right.items():
            found, expected = (real_positions(name, x, mask) for x in (answer[name], value))
            if few_columns(expected):
                gathered[name].append((found, expected))
            elif expected.numel():
                cosines = likeness(found, expected)
                where = f"{name}, {case}"
                yield _Figure(where, float(cosines.mean()), float(cosines.min()), gate(precision, expected))
    for name, pairs in gathered.items():
        found, expected = (torch.cat([x.reshape(-1) for x in each]) for each in zip(*pairs, strict=True))
        if expected.numel():
            mean = float(likeness(found, expected))
            rows = sum(len(each) if each.dim() else 1 for _, each in pairs)
            few = rows if rows < JUDGED_ROWS else None
            yield _Figure(f"{name}, all batches", mean, mean, gate(precision, expected), few)
