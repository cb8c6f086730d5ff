"""What a lower precision loses: a figure of its own beside parity, with a gate for each precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.checks.whole_forward import WholeForward
from fastattn.verification import VerificationError, VerificationReport, real_positions
from fastattn.verification.report import CaseResult

__all__ = ["GATES", "check_precision"]

# Mean cosine between the rows of an output and the reference's (a token's hidden state, a token's logits)
# that a precision must keep, on the worst batch. The batches are random tokens, which spread activations
# wider than texts do: MiniLM in int8 keeps 0.975 on them and 0.991 on sentences. Something broken is far
# below.
GATES = {"fp16": 0.9999, "int8": 0.95, "int8-weight": 0.99, "int4-weight": 0.9}


def check_precision(
    run: WholeForward,
    precision: str,
    reference: nn.Module,
    drawn: Mapping[str, dict[str, Tensor]] | None = None,
) -> dict[str, Any]:
    """Cosine of every row of every output with the reference's, on batches with and without padding.

    Args:
        drawn: the batches by name; drawn at random if None.

    Of fp32 it is only told (a `reference` of other weights may be any distance away): its gate is parity's.

    Returns:
        "cosine_mean" and "cosine_min" of the worst output and batch, "worst" their names, "gate".

    Raises:
        VerificationError: a mean below the gate, or an output that is not finite.
    """
    gate = GATES.get(precision)
    worst: tuple[float, float, str] = (2.0, 2.0, "")
    for case, batch in (run.drawn() if drawn is None else drawn).items():
        mask = batch.get("attention_mask") if "decoder_input_ids" not in batch else None
        found, expected = run.found(batch), run.expected(reference, batch)
        for name, value in expected.items():
            cosines = _cosines(name, found[name], value, mask)
            if cosines.numel() == 0:
                continue
            mean = float(cosines.mean())
            # Written so that a NaN is the worst.
            if not mean >= worst[0]:
                worst = (mean, float(cosines.min()), f"{name}, {case}")
    mean, least, where = worst
    if gate is not None and not mean >= gate:
        report = VerificationReport()
        note = f"mean cosine {mean:.5f} with the reference; {precision} must keep {gate}"
        report.results.append(CaseResult(where, "precision", 1.0 - mean, 1.0 - gate, 1.0, False, note))
        raise VerificationError(report)
    return {"cosine_mean": mean, "cosine_min": least, "worst": where, "gate": gate}


def _cosines(name: str, found: Tensor, expected: Tensor, mask: Tensor | None) -> Tensor:
    """One a row of the last dimension at real positions; numbers without such a dimension are one row."""
    found, expected = (real_positions(name, x, mask).double() for x in (found, expected))
    if expected.dim() < 2 or expected.shape[-1] < 2:
        found, expected = found.reshape(1, -1), expected.reshape(1, -1)
    return torch.nn.functional.cosine_similarity(found.flatten(0, -2), expected.flatten(0, -2), dim=-1)
