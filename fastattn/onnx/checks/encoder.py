"""An exported encoder in ONNX Runtime against the untouched model in PyTorch, on batches that break exports:
texts, images, or both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from fastattn.onnx.graph_spec import Source
from fastattn.verification import CaseResult, lone_padding
from fastattn.verification.batches import Drawing, with_choices
from fastattn.verification.comparison import compare, named_tensors, with_a_row_of_padding
from fastattn.verification.subject import masks_of

__all__ = ["batches", "results"]

Batch = dict[str, Tensor]
Run = Callable[..., Mapping[str, Tensor]]


def results(run: Run, source: Source) -> Iterator[CaseResult]:
    """Real positions, pooled and head outputs; a row of nothing but padding must be finite, where the model's
    is, and change no other.
    """
    drawn = batches(source)
    for case, batch in drawn.items():
        yield from compare(case, run(**batch), _expected(source, batch), masks_of(batch))
    padded = drawn.get("right padding", {})
    if "attention_mask" not in padded:
        return
    # The mean over no token, say, is not finite in the original either.
    original = _expected(source, with_a_row_of_padding(padded))
    finite = [name for name, value in original.items() if bool(torch.isfinite(value).all())]
    for result in lone_padding(lambda batch: run(**batch), padded, masks_of(padded)):
        if result.output in finite:
            yield result


def batches(source: Source) -> dict[str, Batch]:
    """verify's batches, one with holes between its tokens and one of the longest sequence, of the graph's
    inputs alone.
    """
    (spec,) = source.graphs
    drawing = Drawing(source.reference)
    drawn = drawing.batches()
    if "attention_mask" in drawn.get("right padding", {}):
        drawn["holes"] = _with_holes(drawing.batch([drawing.longest] * 3, drawing.longest))
    longest = spec.limits.get("sequence", 0)
    if longest:
        drawn["longest"] = drawing.batch([longest, max(1, longest // 3)], longest)
    if "image_batch_size" in spec.dimensions.get("pixel_values", ()):
        one_image = drawing.batch([longest, 1, 2], longest)
        drawn["one image"] = {**one_image, "pixel_values": one_image["pixel_values"][:1]}
    for case, batch in drawn.items():
        ids = batch.get("input_ids")
        kept = {name: batch[name] for name in spec.inputs if name in batch}
        for name, default in spec.defaults.items():
            if name in spec.inputs and name not in kept and ids is not None:
                kept[name] = torch.full_like(ids, default)
        drawn[case] = with_choices(kept) if "choices" in spec.dimensions.get("input_ids", ()) else kept
    return drawn


def _expected(source: Source, batch: Batch) -> Mapping[str, Tensor]:
    """The graph's outputs as the untouched model gives them."""
    (spec,) = source.graphs
    with torch.no_grad():
        found = named_tensors(source.reference(**batch))
    return {name: found[name] for name in spec.outputs}


def _with_holes(batch: Batch) -> Batch:
    """Every third token hidden, the first of the second row among them."""
    mask = batch["attention_mask"].clone()
    mask[0, 2::3] = 0
    mask[1, ::3] = 0
    return {**batch, "attention_mask": mask}
