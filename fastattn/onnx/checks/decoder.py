"""An exported decoder in ONNX Runtime against the untouched model in PyTorch: prompts that break exports,
decoding after them with a cache, and the cache in buffers longer than what they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.last_positions import LOGITS_TO_KEEP
from fastattn.verification import CaseResult, adversarial_batches, compare_outputs

__all__ = ["CachedDecoder", "positions_of", "results"]

# Tokens decoded after each prompt.
_STEPS = 3
# Rows of a batch as long as it is wide.
_SQUARE = 6
# Prompts are at most this long; it leaves room for the steps in a model of 48 positions.
_LONGEST = 40


def positions_of(mask: Tensor) -> Tensor:
    """The position of every token [B, T], as generate counts: real tokens before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


class CachedDecoder:
    """A decoder's graph in a session, and the cache it keeps.

    Args:
        session: an `onnxruntime.InferenceSession`.
        layers: how many have keys and values.
        room: how many positions the buffers hold that past and present share; 0 for new ones at every step.
    """

    def __init__(self, session: Any, layers: int, room: int = 0) -> None:
        self._session, self._room = session, room
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._names = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
        self._cache: dict[str, Any] = {}

    @property
    def takes_positions(self) -> bool:
        return "position_ids" in self._inputs

    def run(self, ids: Tensor, mask: Tensor, positions: Tensor, keep: int | None = None) -> Tensor:
        """Logits of tokens [B, S] that come behind those in the cache, under a mask [B, T].

        Args:
            positions: [B, S].
            keep: logits of the last so many positions; None leaves it to the graph.
        """
        from onnxruntime import OrtValue

        if not self._cache:
            device = "cuda" if self._session.get_providers()[0].startswith("CUDA") else "cpu"
            for name in self._names:
                _, heads, _, width = self._inputs[f"past_key_values.{name}"].shape
                # What has not been written yet must not matter.
                empty = np.full((len(ids), heads, self._room, width), 1e4, np.float32)
                self._cache[name] = OrtValue.ortvalue_from_numpy(empty, device)
        binding = self._session.io_binding()
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        feeds = {name: x.numpy() for name, x in given.items() if name in self._inputs}
        if keep is not None:
            feeds[LOGITS_TO_KEEP] = np.array([keep])
        # The values hold no copies: they must outlive the run. An input that has a default cannot be bound
        # as an array.
        values = {
            name: OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for name, value in feeds.items()
        }
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        for name in self._names:
            binding.bind_ortvalue_input(f"past_key_values.{name}", self._cache[name])
            if self._room:
                binding.bind_ortvalue_output(f"present.{name}", self._cache[name])
            else:
                binding.bind_output(f"present.{name}")
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        if not self._room:
            self._cache = dict(zip(self._names, present, strict=True))
        return torch.from_numpy(logits.numpy())


def results(session: Any, source: Source, fusions: Mapping[str, int]) -> Iterator[CaseResult]:
    """Logits at real positions against the reference with transformers' own cache.

    Args:
        session: of the graph.
        fusions: the graph's; where every layer's attention is fused, past and present may share buffers.
    """
    assert source.cache is not None
    layers = source.cache["layers"]
    vocabulary = source.graphs[0].value_limits["input_ids"]
    reference = source.reference
    drawn = adversarial_batches(reference)
    prompts = {
        case: (batch["input_ids"], batch["attention_mask"])
        for case, batch in drawn.items()
        if "attention_mask" in batch
    }
    generator = torch.Generator().manual_seed(2)
    for case, (ids, mask) in prompts.items():
        # The end of a left-padded prompt, the beginning of a right-padded one.
        end = slice(-_LONGEST, None) if "left" in case else slice(_LONGEST)
        ids, mask = ids[:, end], mask[:, end]
        if case == "batch == length":
            ids, mask = ids[:_SQUARE, :_SQUARE], mask[:_SQUARE, :_SQUARE]
        steps = [torch.randint(vocabulary, (len(ids), 1), generator=generator) for _ in range(_STEPS)]
        expected = _reference_logits(reference, [ids, *steps], mask)
        decoders = {case: CachedDecoder(session, layers)}
        if fusions.get("cached_attention", 0) == layers and "padding" in case:
            decoders[f"{case}, shared buffers"] = CachedDecoder(session, layers, ids.shape[1] + _STEPS + 2)
        for name, decoder in decoders.items():
            found = _logits(decoder, [ids, *steps], mask)
            for part, index in (("", slice(1)), (", decoding", slice(1, None))):
                real = mask if not part else None
                yield from compare_outputs(
                    name + part,
                    {"logits": torch.cat(found[index], 1)},
                    {"logits": torch.cat(expected[index], 1)},
                    real,
                )
    yield from _in_parts(session, source, *prompts["no padding"])
    yield from _row_of_padding(session, layers, *prompts["right padding"])


def _logits(decoder: CachedDecoder, parts: list[Tensor], mask: Tensor) -> list[Tensor]:
    """Of a prompt under its mask, and of what follows it."""
    found: list[Tensor] = []
    for part in parts:
        if found:
            mask = torch.cat((mask, torch.ones_like(part)), 1)
        positions = positions_of(mask)[:, -part.shape[1] :]
        found.append(decoder.run(part, mask, positions))
    return found


def _reference_logits(reference: Any, parts: list[Tensor], mask: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    cache = None
    takes_positions = "position_ids" in _parameters(reference)
    for part in parts:
        if found:
            mask = torch.cat((mask, torch.ones_like(part)), 1)
        positions = {"position_ids": positions_of(mask)[:, -part.shape[1] :]} if takes_positions else {}
        with torch.no_grad():
            result = reference(
                input_ids=part, attention_mask=mask, past_key_values=cache, use_cache=True, **positions
            )
        cache = result.past_key_values
        found.append(result.logits)
    return found


def _parameters(model: Any) -> set[str]:
    from fastattn.verification.batches import forward_parameters

    return set(forward_parameters(model))


def _in_parts(session: Any, source: Source, ids: Tensor, mask: Tensor) -> Iterator[CaseResult]:
    """A prompt of one row in two parts; the last position's logits alone; the last position there is."""
    assert source.cache is not None
    layers, reference = source.cache["layers"], source.reference
    ids, mask = ids[:1, :_LONGEST], mask[:1, :_LONGEST]
    length = ids.shape[1]
    (whole,) = _reference_logits(reference, [ids], mask)
    positions = positions_of(mask)
    if length > 3:
        decoder, cut = CachedDecoder(session, layers), length - 3
        first = decoder.run(ids[:, :cut], mask[:, :cut], positions[:, :cut])
        second = decoder.run(ids[:, cut:], mask, positions[:, cut:])
        found = {"logits": torch.cat((first, second), 1)}
        yield from compare_outputs("prompt in two parts", found, {"logits": whole}, None)
    last = CachedDecoder(session, layers).run(ids, mask, positions, keep=1)
    yield from compare_outputs("logits_to_keep=1", {"logits": last}, {"logits": whole[:, -1:]}, None)
    longest = source.graphs[0].value_limits.get("position_ids")
    if longest is not None:
        one, ones = ids[:, :1], mask[:, :1]
        end = torch.full_like(one, longest - 1)
        with torch.no_grad():
            expected = reference(input_ids=one, attention_mask=ones, position_ids=end).logits
        at_end = CachedDecoder(session, layers).run(one, ones, end)
        yield from compare_outputs("last position", {"logits": at_end}, {"logits": expected}, None)


def _row_of_padding(session: Any, layers: int, ids: Tensor, mask: Tensor) -> Iterator[CaseResult]:
    """A row of nothing but padding: finite, and without influence on the rows beside it."""
    ids, mask = ids[:, :_LONGEST], mask[:, :_LONGEST].clone()
    mask[1] = 0
    kept = [0, *range(2, len(ids))]
    together = CachedDecoder(session, layers).run(ids, mask, positions_of(mask))
    alone = CachedDecoder(session, layers).run(ids[kept], mask[kept], positions_of(mask[kept]))
    results = compare_outputs("a row of padding", {"logits": together[kept]}, {"logits": alone}, mask[kept])
    for result in results:
        finite = bool(torch.isfinite(together).all())
        yield CaseResult(
            result.case, result.output, result.error, result.tolerance, result.scale, finite, result.note
        )
