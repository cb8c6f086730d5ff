"""An exported encoder in ONNX Runtime against the untouched model in PyTorch, on batches that break exports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import Source
from fastattn.verification import CaseResult, adversarial_batches, compare_outputs, lone_padding
from fastattn.verification.batches import with_choices

__all__ = ["batches", "results"]

Batch = dict[str, Tensor]
Run = Callable[..., Mapping[str, Tensor]]


def results(run: Run, source: Source) -> Iterator[CaseResult]:
    """Real positions, pooled and head outputs; a row of nothing but padding must be finite and change no
    other.
    """
    drawn = batches(source)
    for case, batch in drawn.items():
        with torch.no_grad():
            expected = source.reference(**batch)
        yield from compare_outputs(case, run(**batch), expected, batch.get("attention_mask"))
    if "right padding" in drawn:
        yield from lone_padding(lambda batch: run(**batch), drawn["right padding"])


def batches(source: Source) -> dict[str, Batch]:
    """verify's batches and one of the longest sequence, of the graph's inputs alone."""
    (spec,) = source.graphs
    drawn = adversarial_batches(source.reference)
    if "sequence" in spec.limits:
        drawn["longest"] = _longest(source.reference, spec.limits["sequence"], spec.value_limits["input_ids"])
    for case, batch in drawn.items():
        ids = batch.get("input_ids")
        kept = {name: batch[name] for name in spec.inputs if name in batch}
        for name, default in spec.defaults.items():
            if name not in kept and ids is not None:
                kept[name] = torch.full_like(ids, default)
        drawn[case] = with_choices(kept) if "choices" in spec.dimensions.get("input_ids", ()) else kept
    return drawn


def _longest(reference: nn.Module, longest: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(2, longest, dtype=torch.long)
    mask[1, longest // 3 + 1 :] = 0
    # Token ids below the reserved ones of most vocabularies are no padding for a model that looks for it.
    ids = torch.randint(min(10, vocabulary - 1), vocabulary, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask}
