"""What is verified: the model, its reference, how they are called, and what a case is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.packing import PackingError
from fastattn.verification.batches import with_choices
from fastattn.verification.comparison import Masks, compare, named_tensors
from fastattn.verification.report import CaseResult
from fastattn.verification.state import device_of, evaluating

__all__ = [
    "Case",
    "ModelFailed",
    "Outputs",
    "Replay",
    "Subject",
    "Unavailable",
    "arguments",
    "call",
    "forward_case",
    "from_model",
    "from_reference",
    "layer_masks",
    "masks_of",
    "outputs_of",
    "short",
]

Outputs = Mapping[str, Tensor]


class Unavailable(Exception):
    """A case that does not apply; the message is the reason."""


class ModelFailed(Exception):
    """The model raised where its reference did not; the message says what."""


@dataclass(frozen=True)
class Subject:
    """The model to judge, the reference, and the reference in float32 where both are half precision."""

    model: nn.Module
    reference: nn.Module
    exact: nn.Module | None

    @property
    def device(self) -> torch.device:
        return device_of(self.model)

    def with_model(self, model: nn.Module) -> Subject:
        return replace(self, model=model)


@dataclass(frozen=True)
class Replay:
    """A case once more, layer by layer: what to run on each side, and where its positions are real.

    Attributes:
        model, reference: run on a module, called with the same shapes in the same order.
        masks: padding masks [B, S] by which a layer's outputs are read.
        environment: what both run within.
        precise: False where layers agree to fewer digits than float32 has.
        undisturbed: False where recording layers would be another execution altogether (compiled).
    """

    model: Callable[[nn.Module], Any]
    reference: Callable[[nn.Module], Any]
    masks: tuple[Tensor, ...]
    environment: Callable[..., AbstractContextManager[None]] = evaluating
    precise: bool = True
    undisturbed: bool = True


@dataclass(frozen=True)
class Case:
    """One way of running the model; `results` raises Unavailable where it does not apply."""

    name: str
    results: Callable[[Subject], Iterable[CaseResult]]
    replay: Replay | None = None


def call(model: nn.Module, batch: Mapping[str, Any], **options: Any) -> Outputs:
    """The model's outputs by name."""
    return outputs_of(model(**arguments(model, batch), **options))


def arguments(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as the model takes it: two texts for a head that chooses among them."""
    ids = batch.get("input_ids")
    if type(model).__name__.endswith("ForMultipleChoice") and isinstance(ids, Tensor) and ids.dim() == 2:
        batch = with_choices(dict(batch))
    return {name: _own(value) for name, value in batch.items()}


def outputs_of(result: Any) -> Outputs:
    """The tensors of what a model returned, without the state among them."""
    return {name: x for name, x in named_tensors(result).items() if not name.startswith("past_key_values")}


def _own(value: Any) -> Any:
    """An argument a call may change (a cache) is copied for it."""
    return value if isinstance(value, Tensor) else copy.deepcopy(value)


def masks_of(batch: Mapping[str, Any]) -> Masks:
    """Which of a batch's padding masks belongs to an output."""
    own = batch.get("attention_mask")
    for name, value in batch.items():
        if (
            own is None
            and name.endswith("key_padding_mask")
            and isinstance(value, Tensor)
            and value.dim() == 2
        ):
            # torch.nn's masks say what to ignore, float ones with minus infinity.
            own = ~value if value.dtype == torch.bool else value == 0
    own = own if isinstance(own, Tensor) and own.dim() in (2, 3) else None
    has_decoder = "decoder_input_ids" in batch
    decoder = batch.get("decoder_attention_mask")

    def mask(name: str) -> Tensor | None:
        if "vision" in name or "image" in name:
            return None
        return decoder if has_decoder and not name.startswith("encoder") else own

    return mask


def from_reference(run: Callable[[], Outputs]) -> Outputs:
    """What the reference gives; a case it cannot do does not apply."""
    try:
        return run()
    except (Unavailable, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unavailable(f"the reference itself cannot: {short(error)}") from error


def from_model(run: Callable[[], Outputs]) -> Outputs:
    """What the model gives, where its reference gave something."""
    try:
        return run()
    except (Unavailable, MemoryError, torch.OutOfMemoryError):
        raise
    except PackingError as error:
        raise Unavailable(f"the model refuses, as it was asked to: {short(error)}") from error
    except Exception as error:
        raise ModelFailed(f"raised {short(error)}") from error


def short(error: Exception) -> str:
    """The kind of an error and the first line it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def forward_case(
    name: str,
    batch: Mapping[str, Any],
    found: Callable[[nn.Module], Outputs] | None = None,
    expected: Callable[[nn.Module], Outputs] | None = None,
    masks: Masks | None = None,
) -> Case:
    """A case that compares what `found` gives of the model with what `expected` gives of the reference.

    Args:
        name: of the case.
        batch: what both are called with, unless `found` or `expected` say otherwise.
        found, expected: default one call with the batch.
        masks: default the batch's.
    """
    found = found or (lambda model: call(model, batch))
    expected = expected or found
    chosen = masks or masks_of(batch)

    def results(subject: Subject) -> Iterable[CaseResult]:
        with torch.no_grad(), evaluating(subject.model, subject.reference):
            wanted = from_reference(lambda: expected(subject.reference))
            truth = None
            if subject.exact is not None:
                truth = expected(subject.exact)
            got = from_model(lambda: found(subject.model))
        return list(compare(name, got, wanted, chosen, truth))

    return Case(name, results, Replay(found, expected, layer_masks(batch)))


def layer_masks(batch: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """The batch's padding masks [B, S], by which the outputs of layers are read."""
    masks = (masks_of(batch)("encoder"), batch.get("decoder_attention_mask"))
    return tuple(mask for mask in masks if isinstance(mask, Tensor) and mask.dim() == 2)
