"""verify: a swapped model against the same weights unswapped, in the ways of running it that break
implementations.

`batches` draws what a model takes, `cases` decides what it is put to, `caches`, `training` and `execution`
hold the ways of running it, `comparison` judges outputs, `locate` and `bisect` find the layer, `runner` ties
them together.
"""

from __future__ import annotations

from fastattn.verification.batches import adversarial_batches
from fastattn.verification.cases import CASES
from fastattn.verification.comparison import TOLERANCE, compare_outputs, lone_padding, real_positions
from fastattn.verification.report import CaseResult, NotApplicable, VerificationError, VerificationReport
from fastattn.verification.runner import verify
from fastattn.verification.state import shared_copy

__all__ = [
    "CASES",
    "TOLERANCE",
    "CaseResult",
    "NotApplicable",
    "VerificationError",
    "VerificationReport",
    "adversarial_batches",
    "compare_outputs",
    "lone_padding",
    "real_positions",
    "shared_copy",
    "verify",
]
