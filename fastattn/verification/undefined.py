"""Answers the reference itself does not define: a head reads a padded position whose query sees no key.

Eager attention then averages everything, SDPA gives zeros, and neither is right.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastattn.verification.batches import Drawing
from fastattn.verification.comparison import TOLERANCE, real_positions, relative_error
from fastattn.verification.report import CaseResult, NotApplicable
from fastattn.verification.state import evaluating, shared_copy
from fastattn.verification.subject import Case, Outputs, Subject, call

__all__ = ["split_undefined"]

_PADDED = ("right padding", "left padding", "one row", "longer than the window")


def split_undefined(
    case: Case, results: Iterable[CaseResult], subject: Subject, earlier: Iterable[NotApplicable]
) -> tuple[list[CaseResult], list[NotApplicable]]:
    """A case's results without the failed ones for which the reference has no answer of its own, and those.

    Where eager attention and SDPA, which agree without padding, differ with it.

    Args:
        case: that gave the results.
        results: its results.
        subject: the model and its reference.
        earlier: what was found undefined before; a compiled call is compared on the same batches.
    """
    kept, undefined = [], []
    known = {each.case for each in earlier}
    for result in results:
        label = f"{result.case}: {result.output}"
        if result.passed or result.note:
            kept.append(result)
        elif case.name == "compile" and result.output in known:
            undefined.append(NotApplicable(label, "undefined in the reference, as without compilation"))
        elif case.name in _PADDED and (error := _disagreement(case, result.output, subject)) is not None:
            reason = f"the reference's own eager and SDPA attention differ there (error {error:.1e}): "
            reason += "a query that sees no key is read"
            undefined.append(NotApplicable(label, reason))
        else:
            kept.append(result)
    return kept, undefined


def _disagreement(case: Case, output: str, subject: Subject) -> float | None:
    """How far the reference's implementations of attention are apart, where that is due to padding alone."""
    if case.replay is None or not hasattr(subject.reference, "set_attn_implementation"):
        return None
    drawing = Drawing(subject.reference)
    unpadded = drawing.batch([drawing.longest] * 2, drawing.longest)
    found: list[tuple[Outputs, Outputs]] = []
    for name in ("eager", "sdpa"):
        model: Any = shared_copy(subject.exact or subject.reference)
        try:
            model.set_attn_implementation(name)
            with torch.no_grad(), evaluating(model):
                found.append((call(model, unpadded), _run(case, model)))
        except Exception:
            # It has one implementation only.
            return None
    (plain, padded), (other_plain, other_padded) = found
    if output not in plain or output not in padded:
        return None
    if relative_error(other_plain[output], plain[output]) > TOLERANCE:
        return None
    mask = next(iter(case.replay.masks), None)
    error = relative_error(
        real_positions(output, other_padded[output], mask), real_positions(output, padded[output], mask)
    )
    return error if not error <= TOLERANCE else None


def _run(case: Case, model: nn.Module) -> Outputs:
    assert case.replay is not None
    outputs: Outputs = case.replay.reference(model)
    return outputs
