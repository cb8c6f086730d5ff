"""Exported decoders: language models whose one graph does prompts and single tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastattn.onnx.runtime.decoder_cache import DecoderCache, DecoderGraph
from fastattn.onnx.runtime.generation import OnnxGenerationModel, as_int64, generation_config_of

__all__ = ["OnnxDecoder"]

Array = np.ndarray[Any, Any]


class OnnxDecoder(OnnxGenerationModel):
    """An exported decoder with a language modelling head."""

    def __init__(
        self,
        folder: Path,
        manifest: Mapping[str, Any],
        provider: str | None = None,
        session_options: Any = None,
    ) -> None:
        super().__init__(folder, manifest, provider, session_options)
        (graph,) = self.graphs.values()
        # The operator that every layer must have become to read and write one buffer.
        fused = manifest["graphs"]["model"].get("fusions", {}).get("cached_attention", 0)
        shared = fused == (manifest.get("cache") or {}).get("layers")
        self.decoder_graph = DecoderGraph(graph, shared, fused > 0, self.device)
        self.generation_config = generation_config_of(folder, self.config)

    def new_cache(self, capacity: int) -> DecoderCache:
        return DecoderCache(self.decoder_graph, capacity)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits of every position, or of the last ones.

        Args:
            input_ids: integers [batch, sequence], torch or numpy.
            attention_mask: integers [batch, past + sequence], 0 = padding; default all ones.
            position_ids: integers [batch, sequence] or [1, sequence]; default counts on from the past.
            past_key_values: what an earlier call returned; it is extended in place, as transformers' caches
                are.
            use_cache: whether to return the cache; default as the config says.
            logits_to_keep: logits of the last so many positions; 0 for all.
            return_dict: False for a tuple.

        Returns:
            The original's output class with `logits` and `past_key_values`.

        Raises:
            TypeError, ValueError: an argument that the export does not have or cannot take.
        """
        self._only_inputs(kwargs, ("input_ids", "attention_mask", "position_ids", "past_key_values"))
        if input_ids is None:
            raise TypeError(f"input_ids is missing; the model takes {', '.join(self.decoder_graph.takes)}")
        if not isinstance(logits_to_keep, int):
            raise TypeError(f"logits_to_keep is a {type(logits_to_keep).__name__}; it must be an int")
        cache = self._own_cache(past_key_values, 0)
        ids = self.decoder_graph.graph.checked("input_ids", input_ids)
        mask = self._mask(attention_mask, ids, cache.get_seq_length())
        inputs = self._inputs(ids, mask, position_ids, cache.get_seq_length())
        logits = cache.run(inputs, logits_to_keep)
        cached = self.config.use_cache if use_cache is None else use_cache
        results = {"logits": logits, **({"past_key_values": cache} if cached else {})}
        wanted = self.config.return_dict if return_dict is None else return_dict
        return self._answer(results, input_ids, wanted)

    def _mask(self, given: Any, ids: Array, past: int) -> Array:
        """int64 [batch, past + sequence]."""
        shape = (ids.shape[0], past + ids.shape[1])
        if given is None:
            return np.ones(shape, np.int64)
        mask = self.decoder_graph.graph.checked("attention_mask", given)
        if mask.shape != shape:
            raise ValueError(
                f"attention_mask must be [batch, past + sequence], {list(shape)}; got {list(mask.shape)}"
            )
        return mask

    def _inputs(self, ids: Array, mask: Array, position_ids: Any, past: int) -> dict[str, Array]:
        """The graph's inputs but for the cache.

        Raises:
            ValueError: positions of one's own, for a model that has none or counts them itself.
        """
        new = ids.shape[1]
        counted = np.broadcast_to(np.arange(past, past + new), ids.shape)
        takes = "position_ids" in self.decoder_graph.takes
        positions = counted
        if position_ids is not None:
            graph = self.decoder_graph.graph
            positions = graph.checked("position_ids", position_ids) if takes else as_int64(position_ids)
        if positions.shape not in (ids.shape, (1, new)):
            raise ValueError(
                f"position_ids must be [batch, sequence], {list(ids.shape)}; got {list(positions.shape)}"
            )
        inputs = {"input_ids": ids, "attention_mask": mask}
        if takes:
            inputs["position_ids"] = np.ascontiguousarray(np.broadcast_to(positions, ids.shape))
        elif not (positions == counted).all() and not (positions == _real_positions(mask)[:, -new:]).all():
            raise ValueError(
                f"position_ids is given, but {self.architecture} takes none: it counts the mask's ones"
            )
        return inputs

    def _steps(
        self, input_ids: Tensor, cache: DecoderCache, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> tuple[Callable[[], Array], Callable[[Array], Array]]:
        self._only_inputs(
            {
                name: value
                for name, value in model_kwargs.items()
                if name not in ("position_ids", "past_key_values", "logits_to_keep")
            },
            ("input_ids", "attention_mask"),
        )
        past, batch = cache.get_seq_length(), input_ids.shape[0]
        given = model_kwargs.get("attention_mask")
        # A mask of ones is dropped by transformers >= 5.20, which notes its length.
        length = input_ids.shape[1] if given is None else given.shape[1]
        if given is None:
            length = getattr(generation_config, "_mask_length", length)
        # A continued prompt is given whole, or as what is new beside the whole mask.
        new = input_ids.shape[1] - (past if length == input_ids.shape[1] else 0)
        if new < 1:
            raise ValueError(
                f"input_ids has {input_ids.shape[1]} tokens and past_key_values holds {past}: none is new"
            )
        ids = self.decoder_graph.graph.checked("input_ids", input_ids[:, -new:])
        total = past + new
        # One mask for all steps: what is generated is real. Each step sees as much of it as there are
        # positions.
        room = max(total, generation_config.max_length)
        masks = np.ones((batch, room), np.int64)
        masks[:, :total] = self._mask(given, ids, past)
        position_ids = model_kwargs.get("position_ids")
        if position_ids is not None:
            position_ids = position_ids[:, -new:]
        inputs = self._inputs(ids, np.ascontiguousarray(masks[:, :total]), position_ids, past)
        takes_positions = "position_ids" in inputs
        next_positions = inputs["position_ids"][:, -1:] + 1 if takes_positions else np.empty(0, np.int64)
        chunk = generation_config.prefill_chunk_size or new

        def prefill() -> Array:
            for start in range(0, new, chunk):
                part = {
                    name: np.ascontiguousarray(value[:, start : start + chunk])
                    for name, value in inputs.items()
                }
                end = past + min(start + chunk, new)
                part["attention_mask"] = np.ascontiguousarray(masks[:, :end])
                logits = cache.run(part, keep=1, reuse=True)
            return logits[:, -1]

        def step(tokens: Array) -> Array:
            nonlocal masks
            end = cache.get_seq_length() + 1
            if end > masks.shape[1]:  # Stopping criteria of one's own may let it run on.
                masks = np.concatenate((masks, np.ones_like(masks)), 1)
            following = {"input_ids": tokens, "attention_mask": np.ascontiguousarray(masks[:, :end])}
            if takes_positions:
                following["position_ids"] = next_positions
            logits = cache.run(following, keep=1, reuse=True)
            next_positions[...] += 1
            return logits[:, -1]

        return prefill, step


def _real_positions(mask: Array) -> Array:
    """The number of real tokens before each; 0 for padding."""
    positions: Array = (mask.cumsum(1) - 1) * (mask != 0)
    return positions
