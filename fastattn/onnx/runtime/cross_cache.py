"""The cache of an exported encoder-decoder: the decoder's keys and values, and the encoder output's."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.onnx.runtime.cache_storage import bind_input, bind_output
from fastattn.onnx.runtime.decoder_cache import DecoderCache

__all__ = ["CrossCache"]

Array = np.ndarray[Any, Any]


class CrossCache(DecoderCache):
    """`past_key_values` of an exported encoder-decoder.

    The first run computes keys and values of the encoder's output into buffers that every later run reads in
    place.
    """

    _cross: tuple[Tensor, ...] = ()  # Held while the session reads them.

    def run(self, inputs: dict[str, Array], keep: int = 0, reuse: bool = False) -> Array:
        """As of the base class; runs after the first may leave out encoder_hidden_states and its mask."""
        if self._cross:
            return super().run(inputs, keep, reuse)
        decoder, binding = self.decoder, self._binding
        entries = decoder.cross
        batch, length = inputs["input_ids"].shape[0], inputs["encoder_hidden_states"].shape[1]
        made = tuple(
            torch.empty(batch, each.heads, length, each.size, dtype=decoder.dtype, device=decoder.device)
            for each in entries
        )
        for entry, tensor in zip(entries, made, strict=True):
            bind_input(binding, entry.past, tensor[:, :, :0].contiguous())
            bind_output(binding, entry.present, tensor)
        logits = super().run({**inputs, "use_cache_branch": np.array([False])}, keep, reuse)
        # Later runs compute none of this: logits and caches are bound anew.
        binding.clear_binding_outputs()
        self._bound, self._logits = -1, np.empty(0)
        binding.bind_cpu_input("use_cache_branch", np.array([True]))
        self._hold(made)
        return logits

    def _hold(self, cross: tuple[Tensor, ...]) -> None:
        self._cross = cross
        for entry, tensor in zip(self.decoder.cross, cross, strict=True):
            bind_input(self._binding, entry.past, tensor)
            # Onto itself: what the graph would copy from one to the other, it then leaves where it is.
            bind_output(self._binding, entry.present, tensor)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, int64 [batch], as beam search moves them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        rows = indices.to(self.decoder.device)
        if self._cross and not torch.equal(rows.cpu(), torch.arange(self._cross[0].shape[0])):
            self._hold(tuple(tensor.index_select(0, rows) for tensor in self._cross))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.batch_select_indices(torch.arange(self.storage.batch).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderCache:
        made = super().__deepcopy__(memo)
        if self._cross and isinstance(made, CrossCache):
            made._binding.bind_cpu_input("use_cache_branch", np.array([True]))
            made._hold(tuple(tensor.clone() for tensor in self._cross))
        return made
