"""One whole forward pass of an export of any kind beside the same pass in PyTorch: what the loss of a lower
precision and the time of a batch are measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.runtime.plain import OnnxModel
from fastattn.verification import adversarial_batches
from fastattn.verification.batches import Drawing
from fastattn.verification.comparison import named_tensors
from fastattn.verification.likeness import JUDGED_ROWS

__all__ = ["WholeForward"]

Batch = Mapping[str, Tensor]


class WholeForward:
    """The exported graphs, called as one model.

    Decoders run a prompt with empty caches, encoder-decoders the encoder and then a prompt of the decoder.
    """

    def __init__(self, folder: Path, source: Source, session_options: Any = None) -> None:
        self._source = source
        self._graphs = {
            spec.name: OnnxModel(folder, session_options, graph=spec.name) for spec in source.graphs
        }

    def typical(self) -> dict[str, Tensor]:
        """A batch with padding, where the model has any; of a module of the user's own the example."""
        if self._source.kind == "module":
            return dict(self._source.graphs[0].inputs)
        drawn = adversarial_batches(self._source.reference)
        return self.batch(drawn.get("right padding") or next(iter(drawn.values())))

    def drawn(self) -> dict[str, dict[str, Tensor]]:
        """Batches with and without padding by case."""
        if self._source.kind == "module":
            return {"the example": self.typical()}
        drawing = Drawing(self._source.reference)
        batches = drawing.batches()
        if not drawing.sides:
            # Three images or recordings are too few to judge labels by.
            batches["many rows"] = drawing.batch([1] * JUDGED_ROWS, 1)
        return {case: self.batch(batch) for case, batch in batches.items()}

    def batch(self, batch: Batch) -> dict[str, Tensor]:
        """Of a batch of the original's inputs, what both sides take; what has a default and is left out is
        given.
        """
        taken = {name: batch[name] for spec in self._source.graphs for name in spec.inputs if name in batch}
        if "decoder_input_ids" in batch:
            taken = {name: x for name, x in batch.items() if name != "decoder_attention_mask"}
        mask = taken.get("attention_mask")
        if self._source.kind == "decoder" and "position_ids" in self._source.graphs[0].inputs:
            assert mask is not None
            taken["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        ids = taken.get("input_ids")
        for name, default in self._source.graphs[0].defaults.items():
            if (
                name not in taken
                and ids is not None
                and ids.dim() == len(self._source.graphs[0].dimensions[name])
            ):
                taken[name] = torch.full_like(ids, default)
        return taken

    def found(self, batch: Batch) -> dict[str, Tensor]:
        """The answer of the export; caches are left out."""
        run: Callable[[Batch], Mapping[str, Tensor]] = {
            "decoder": self._decode,
            "encoder-decoder": self._encode_and_decode,
        }.get(self._source.kind, lambda inputs: self._graphs["model"](**inputs))
        return {name: x for name, x in run(batch).items() if not name.startswith("present.")}

    def expected(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The answer of `model` in PyTorch, under the names of the export's outputs."""
        with torch.inference_mode():
            answer = model(**batch)
        outputs = self._source.graphs[-1].outputs
        tensors = named_tensors(answer)
        if self._source.kind == "module":
            return dict(zip(outputs, tensors.values(), strict=True))
        return {name: tensors[name] for name in outputs if name in tensors}

    def _empty_cache(self, name: str, rows: int) -> Tensor:
        (entry,) = (
            each for each in self._graphs[self._source.graphs[-1].name].inputs if each["name"] == name
        )
        shape = [size if isinstance(size, int) else 0 for size in entry["dimensions"]]
        return torch.zeros(rows, *shape[1:])

    def _decode(self, batch: Batch) -> Mapping[str, Tensor]:
        (spec,) = self._source.graphs
        rows = len(batch["input_ids"])
        cache = {name: self._empty_cache(name, rows) for name in spec.inputs if name.startswith("past_key")}
        answer: Mapping[str, Tensor] = self._graphs["model"](**batch, **cache)
        return answer

    def _encode_and_decode(self, batch: Batch) -> Mapping[str, Tensor]:
        encoder, decoder = self._source.graphs
        states = self._graphs[encoder.name](**{name: batch[name] for name in encoder.inputs})
        ids = batch["decoder_input_ids"]
        given: dict[str, Tensor] = {
            "input_ids": ids,
            "encoder_hidden_states": states["last_hidden_state"],
            "use_cache_branch": torch.tensor([False]),
        }
        if "encoder_attention_mask" in decoder.inputs:
            given["encoder_attention_mask"] = batch["attention_mask"]
        for name in decoder.inputs:
            if name.startswith("past_key"):
                given[name] = self._empty_cache(name, len(ids))
        answer: Mapping[str, Tensor] = self._graphs[decoder.name](
            **{name: given[name] for name in decoder.inputs if name in given}
        )
        return answer
