"""A decoder's graph with its keys and values: what `past_key_values` of an exported decoder is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.onnx.runtime.cache_storage import (
    CacheEntry,
    CacheStorage,
    GrowingStorage,
    SharedStorage,
)
from fastattn.onnx.runtime.graph_session import GraphSession

__all__ = ["DecoderCache", "DecoderGraph"]

LOGITS_TO_KEEP = "logits_to_keep"
BY_TOKEN = ("input_ids", "position_ids")
Array = np.ndarray[Any, Any]


class DecoderGraph:
    """What a decoder's session takes and gives.

    Attributes:
        graph: the session.
        entries: keys and values of the self-attention, in the graph's order.
        cross: those of the attention to an encoder, if there is one.
        shared: whether past and present may be one buffer.
        one_row: whether several tokens behind a past are for a batch of one only, which is what ONNX
            Runtime's GroupQueryAttention says (1.31).
        takes: names of the other inputs.
        keeps: whether the graph can be asked for the last positions' logits alone.
        longest: positions the model has; None for no limit.
        vocabulary: number of logits.
        dtype, device: of the cache.
    """

    def __init__(self, graph: GraphSession, shared: bool, one_row: bool, device: torch.device) -> None:
        self.graph, self.session, self.device = graph, graph.session, device
        self.shared, self.one_row = shared, one_row
        inputs = {value.name: value for value in self.session.get_inputs()}
        self.entries = _entries(inputs, [name for name in graph.input_names if ".encoder." not in name])
        self.cross = _entries(inputs, [name for name in graph.input_names if ".encoder." in name])
        self.dtype = torch.float16 if "float16" in inputs[self.entries[0].past].type else torch.float32
        pasts = {entry.past for entry in (*self.entries, *self.cross)}
        self.takes = tuple(name for name in graph.input_names if name not in {*pasts, LOGITS_TO_KEEP})
        self.keeps = LOGITS_TO_KEEP in {value.name for value in self.session.get_overridable_initializers()}
        bounds = [
            longest
            for entry in graph.inputs.values()
            for size, longest in entry["bounds"].items()
            if "sequence" in size and "encoder" not in size
        ]
        self.longest = min(bounds) if bounds else None
        logits = next(value for value in self.session.get_outputs() if value.name == "logits")
        self.vocabulary = int(logits.shape[-1])
        self.logits_dtype = np.dtype(np.float16 if "float16" in logits.type else np.float32)

    def storage(self) -> CacheStorage:
        kind = SharedStorage if self.shared else GrowingStorage
        return kind(self.entries, self.dtype, self.device)


def _entries(inputs: dict[str, Any], names: list[str]) -> tuple[CacheEntry, ...]:
    pasts = [name for name in names if name.startswith("past_key_values.")]
    return tuple(
        CacheEntry(
            past,
            past.replace("past_key_values.", "present.", 1),
            int(inputs[past].shape[1]),
            int(inputs[past].shape[3]),
        )
        for past in pasts
    )


class DecoderCache:
    """Keys and values of every layer in preallocated buffers, bound to the session that fills them.

    What the model's `past_key_values` is: pass it on to continue. Not for use by two threads at once.

    Args:
        decoder: the graph.
        capacity: positions to make room for at first; it grows beyond.
    """

    # What transformers' generation asks of a cache.
    is_compileable = False
    is_croppable = True

    def __init__(self, decoder: DecoderGraph, capacity: int = 0) -> None:
        self.decoder, self.capacity = decoder, capacity
        self.storage = decoder.storage()
        self._binding = decoder.session.io_binding()
        self._bound = -1
        self._keep = np.zeros(1, np.int64)
        self._logits: Array = np.empty(0)

    def run(self, inputs: dict[str, Array], keep: int = 0, reuse: bool = False) -> Array:
        """Add the inputs' positions to the cache.

        Args:
            inputs: the graph's inputs but for the cache, contiguous; input_ids is int64 [batch, sequence].
            keep: logits of the last so many positions; 0 for all.
            reuse: whether the logits may lie in the buffer of the run before.

        Returns:
            The logits, float32 or float16 [batch, kept, vocabulary].

        Raises:
            ValueError: more positions than the model has, or rows than the cache has.
        """
        decoder, storage, binding = self.decoder, self.storage, self._binding
        batch, new = inputs["input_ids"].shape
        if decoder.one_row and batch > 1 and new > 1 and storage.length:
            return self._run_by_columns(inputs, keep)
        total = storage.length + new
        if decoder.longest is not None and total > decoder.longest:
            raise ValueError(f"{total} positions; the model has {decoder.longest}")
        storage.reserve(batch, total, self._room(total))
        for name, value in inputs.items():
            binding.bind_cpu_input(name, value)
        if storage.version != self._bound:
            storage.bind(binding, new)
            self._bound = storage.version
        keep = min(keep, new) or new
        computed = keep if decoder.keeps else new
        if decoder.keeps and computed != self._keep[0]:
            self._keep = np.array([computed])
            # bind_cpu_input looks among the inputs proper only, and this one is an initializer.
            binding.bind_input(LOGITS_TO_KEEP, "cpu", 0, np.int64, (1,), self._keep.ctypes.data)
        shape = (batch, computed, decoder.vocabulary)
        if not reuse or self._logits.shape != shape:
            self._logits = np.empty(shape, decoder.logits_dtype)
            binding.bind_output("logits", "cpu", 0, self._logits.dtype, shape, self._logits.ctypes.data)
        self._run(binding)
        storage.advance(new)
        return self._logits[:, -keep:]

    def _run_by_columns(self, inputs: dict[str, Array], keep: int) -> Array:
        """One token of every row at a time."""
        new = inputs["input_ids"].shape[1]
        logits: list[Array] = []
        for column in range(new):
            columns = {name: inputs[name][:, column : column + 1] for name in BY_TOKEN if name in inputs}
            part = {**inputs, **columns}
            if "attention_mask" in inputs:
                part["attention_mask"] = inputs["attention_mask"][:, : self.storage.length + 1]
            logits.append(self.run({name: np.ascontiguousarray(value) for name, value in part.items()}))
        return np.concatenate(logits[-keep:], 1)

    def _run(self, binding: Any) -> None:
        self.decoder.session.run_with_iobinding(binding)

    def _room(self, total: int) -> int:
        """Positions to make room for: what the caller foresees, within reason."""
        longest = self.decoder.longest
        room = max(self.capacity, total + 64)
        # A generation_config may say "up to 131072"; buffers double when that is reached.
        room = min(room, max(2 * total, total + 1024))
        return room if longest is None else min(room, longest)

    # The methods of transformers' Cache that its generation uses.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions filled."""
        return self.storage.length

    def __len__(self) -> int:
        return len(self.decoder.entries) // 2

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` positions; a number below zero takes as many off the end."""
        length = self.storage.length
        self.storage.crop(length + max_length if max_length <= 0 else max_length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows by index, int64 [batch], as beam search moves them."""
        self.storage.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.storage.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        self.storage.select(torch.arange(self.storage.batch).repeat_interleave(repeats))

    def activate_past_recording(self) -> None:
        """Nothing to do: what `crop` takes off is still there."""

    def __deepcopy__(self, memo: dict[int, Any]) -> DecoderCache:
        made = type(self)(self.decoder, self.capacity)
        if self.storage.length:
            made.storage.reserve(self.storage.batch, self.storage.length, self.storage.capacity)
            made.storage.length = self.storage.length
            for view, tensor in zip(made.storage.filled(), self.storage.filled(), strict=True):
                view.copy_(tensor)
        return made
