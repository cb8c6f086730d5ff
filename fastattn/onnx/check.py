"""The exported file in ONNX Runtime against the untouched model in PyTorch, on batches that break exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.verification import (
    VerificationError,
    VerificationReport,
    adversarial_batches,
    compare_outputs,
    lone_padding,
)

__all__ = ["check_export"]

Batch = dict[str, Tensor]


def check_export(
    exported: Callable[..., Mapping[str, Tensor]],
    reference: nn.Module,
    dimensions: tuple[str, ...],
    longest: int,
) -> VerificationReport:
    """Compare real positions, pooled and head outputs; float32, at most 1e-4 of each output's largest value.

    Args:
        exported: called with a batch as keyword arguments; gives its outputs by name.
        reference: the unswapped model, in eval mode.
        dimensions: names of the inputs' dimensions.
        longest: largest sequence length.

    Raises:
        VerificationError: an output is too far off or not finite; the message names the worst case.
    """
    report = VerificationReport()
    batches = _batches(reference, dimensions, longest)
    for case, batch in batches.items():
        with torch.no_grad():
            expected = reference(**batch)
        report.results.extend(compare_outputs(case, exported(**batch), expected, batch["attention_mask"]))
    report.results.extend(lone_padding(lambda batch: exported(**batch), batches["right padding"]))
    if not report.passed:
        raise VerificationError(report)
    return report


def _batches(reference: nn.Module, dimensions: tuple[str, ...], longest: int) -> dict[str, Batch]:
    """verify's batches, and one of the longest sequence; token types always, for they are an input of the
    file.
    """
    batches = adversarial_batches(reference)
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, longest, dtype=torch.long)
    mask[1, longest // 3 + 1 :] = 0
    config: Any = reference.config
    ids = torch.randint(0, config.vocab_size, mask.shape, generator=generator)
    batches["longest"] = {"input_ids": ids, "attention_mask": mask}
    for batch in batches.values():
        batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
        if "choices" in dimensions:
            # Texts to choose among, two a question.
            batch.update({name: x.unsqueeze(1).repeat(1, 2, 1) for name, x in batch.items()})
    return batches
