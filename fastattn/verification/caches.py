"""Decoding with a cache, token by token: against the full forward, and with a static cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.verification.batches import Drawing
from fastattn.verification.comparison import TOLERANCE, relative_error
from fastattn.verification.report import CaseResult
from fastattn.verification.subject import (
    Case,
    Outputs,
    Replay,
    Subject,
    Unavailable,
    call,
    forward_case,
    from_reference,
    layer_masks,
)

__all__ = ["cache_cases", "keeps_a_cache", "with_positions"]

# Tokens decoded one by one after the prompt.
_STEPS = 3


def keeps_a_cache(model: nn.Module, batch: Mapping[str, Tensor]) -> bool:
    """Whether the model gives back a cache where it is asked for one: what makes it a decoder."""
    drawing_names = _names(model)
    if not {"past_key_values", "use_cache"} <= drawing_names:
        return False
    try:
        with torch.no_grad():
            outputs = model(**batch, use_cache=True)
    except Exception:
        # Such a model (GPT-2's classifier without a pad token) has its own case to say so.
        return False
    cache = getattr(outputs, "past_key_values", None)
    return hasattr(cache, "get_seq_length")


def with_positions(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch with position_ids that count real tokens, as generate counts them; some models do it
    themselves, others do not.
    """
    if "position_ids" not in _names(model) or "attention_mask" not in batch or "decoder_input_ids" in batch:
        return dict(batch)
    mask = batch["attention_mask"]
    return {**batch, "position_ids": (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)}


def cache_cases(model: nn.Module, drawing: Drawing) -> list[Case]:
    """Both cases of a decoder, on prompts padded on the left and of different lengths."""
    width = drawing.longest
    shortest = min(_STEPS + 1 + 3, width)
    batch = with_positions(
        model, drawing.batch([width, max(shortest, width - 5), shortest], width, left=True)
    )
    decoder = len(drawing.sides) > 1 or "decoder_input_ids" in batch
    tokens = "decoder_input_ids" if decoder else "input_ids"
    mask = batch.get("decoder_attention_mask" if decoder else "attention_mask")
    masks = layer_masks(batch)
    if mask is not None:
        masks = (*masks, mask[:, :-_STEPS])

    def full(which: nn.Module) -> Outputs:
        return _per_token(call(which, batch), batch[tokens])

    def stepped(which: nn.Module) -> Outputs:
        return _decode(which, batch, tokens, None)

    def static(which: nn.Module) -> Outputs:
        return _decode(which, batch, tokens, _static_cache(which, batch, tokens))

    if batch[tokens].shape[1] <= _STEPS + 1:
        reason = f"it has positions for {width} tokens, too few for a prompt and {_STEPS} more"
        return [unavailable_case(name, reason) for name in ("dynamic cache", "static cache")]
    dynamic_case = forward_case("dynamic cache", batch, stepped, full)
    static_case = forward_case("static cache", batch, static, stepped)

    def results(subject: Subject) -> Iterable[CaseResult]:
        _static_works(subject, static, stepped, mask)
        return static_case.results(subject)

    return [
        Case("dynamic cache", dynamic_case.results, Replay(stepped, stepped, masks)),
        Case("static cache", results, Replay(static, stepped, masks)),
    ]


def unavailable_case(name: str, reason: str) -> Case:
    """A case that does not apply to this model."""

    def results(subject: Subject) -> Iterable[CaseResult]:
        raise Unavailable(reason)

    return Case(name, results)


def _names(model: nn.Module) -> set[str]:
    from fastattn.verification.batches import forward_parameters

    return set(forward_parameters(model))


def _static_works(subject: Subject, static: Any, stepped: Any, mask: Tensor | None) -> None:
    """Raise Unavailable where the reference's own static cache fails or gives something else than its dynamic
    one.
    """
    reference = subject.exact or subject.reference
    with torch.no_grad():
        was_training = reference.training
        reference.eval()
        try:
            own = from_reference(lambda: static(reference))
            wanted = from_reference(lambda: stepped(reference))
        finally:
            reference.train(was_training)
    for name, value in wanted.items():
        real = mask.bool() if mask is not None else torch.ones(value.shape[:2], dtype=torch.bool)
        error = relative_error(own[name][real.to(value.device)], value[real.to(value.device)])
        if not error <= TOLERANCE:
            raise Unavailable(
                f"the reference itself gives other {name} with a static cache than with a dynamic one "
                f"(error {error:.1e})"
            )


def _static_cache(model: nn.Module, batch: Mapping[str, Tensor], tokens: str) -> Any:
    """An empty static cache with room left over, as generate makes it."""
    from transformers import EncoderDecoderCache, StaticCache

    config: Any = model.config
    own = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=batch[tokens].shape[1] + 5)
    if tokens == "input_ids":
        return own
    source = batch.get("attention_mask", batch.get("input_ids"))
    # Whisper halves the frames of a recording.
    length = config.max_source_positions if source is None else source.shape[1]
    cross = StaticCache(config=config.get_text_config(decoder=True), max_cache_len=length)
    return EncoderDecoderCache(own, cross)


def _decode(model: nn.Module, batch: Mapping[str, Tensor], tokens: str, cache: Any) -> Outputs:
    """The prompt in one call, the last tokens one by one; the outputs as one call would give them."""
    width = batch[tokens].shape[1]
    prompt = width - _STEPS
    mask_name = "attention_mask" if tokens == "input_ids" else "decoder_attention_mask"
    sliced = (tokens, "position_ids", "token_type_ids") if tokens == "input_ids" else (tokens,)
    inputs: dict[str, Any] = dict(batch)
    parts: list[Outputs] = []
    for start, end in [(0, prompt), *((t, t + 1) for t in range(prompt, width))]:
        step = dict(inputs)
        for name in sliced:
            if name in batch:
                step[name] = batch[name][:, start:end]
        if mask_name in batch:
            step[mask_name] = batch[mask_name][:, :end]
        outputs = model(**step, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(_per_token(_named(outputs), step[tokens]))
        encoded = getattr(outputs, "encoder_last_hidden_state", None)
        if tokens != "input_ids" and start == 0 and encoded is not None:
            from transformers.modeling_outputs import BaseModelOutput

            inputs = {
                name: value
                for name, value in inputs.items()
                if name not in ("input_ids", "input_features", "token_type_ids")
            }
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
    return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}


def _named(outputs: Any) -> Outputs:
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor)}


def _per_token(outputs: Outputs, ids: Tensor) -> Outputs:
    """The outputs that have one value a token of the decoder."""
    found = {
        name: value
        for name, value in outputs.items()
        if value.shape[:2] == ids.shape and value.dim() > 2 and not name.startswith("encoder")
    }
    if not found:
        raise Unavailable("its head gives one value a text, none that decoding could continue from")
    return found
