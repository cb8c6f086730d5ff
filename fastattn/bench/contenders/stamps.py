"""Greedy decoding through transformers' `generate`, with the time at which each token was there; and the
logits a model gives for tokens decoded already.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from typing import Any

import torch

from fastattn.bench.contenders.runner import Generated

__all__ = ["counted_positions", "forced_logits", "greedy_config", "greedy_tokens", "start_token"]


class _Stamps:
    """A streamer, as `generate` takes it: milliseconds from the start at which each step's tokens, of all
    sequences, were on the host.
    """

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.stamps_ms: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.stamps_ms.append((time.perf_counter() - self.begin) * 1e3)

    def end(self) -> None:
        pass


def greedy_config(model: Any) -> Any:
    """A generation config that decodes greedily to the last token asked for, whatever the model's own says.

    Set it as the `generation_config` of a copy: `generate` fills whatever it is not told from there, and so
    would find an end token, forced tokens or beams again.
    """
    from transformers import GenerationConfig

    padding = _special_token(model, "pad_token_id")
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        # Nothing ends early, so nothing is padded; but a batch without a padding token is warned of.
        pad_token_id=0 if padding is None else padding,
        decoder_start_token_id=start_token(model) if model.config.is_encoder_decoder else None,
    )


def start_token(model: Any) -> int:
    """What an encoder-decoder's decoder begins with; 0 where its configs name nothing."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    found = (_special_token(model, name) for name in names)
    return next((token for token in found if token is not None), 0)


def _special_token(model: Any, name: str) -> int | None:
    value = getattr(getattr(model, "generation_config", None), name, None)
    value = getattr(model.config, name, None) if value is None else value
    return value if isinstance(value, int) else None


def greedy_tokens(model: Any, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
    """Exactly `new_tokens` tokens a sequence from a model with transformers' `generate`.

    Args:
        model: its `generation_config` is `greedy_config`'s.
        inputs: input_ids and attention_mask, int64 [batch, sequence]: left-padded prompts, or an
            encoder-decoder's source.
        new_tokens: 1 or more.

    Returns:
        The tokens, and a stamp for each. The first one's includes the prompt.
    """
    streamer = _Stamps()
    with torch.inference_mode():
        found = model.generate(**inputs, max_new_tokens=new_tokens, streamer=streamer)
    # The prompt, or the decoder's first token, is put before any new one.
    return Generated(found[:, -new_tokens:], tuple(streamer.stamps_ms[-new_tokens:]))


def forced_logits(model: Any, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
    """The logits that predict each token, the tokens before it given, in one forward.

    Args:
        model: with transformers' interface; its `generation_config` is `greedy_config`'s.
        inputs: as `greedy_tokens` takes them.
        tokens: int64 [batch, new_tokens].

    Returns:
        [batch, new_tokens, vocabulary] in the model's dtype.
    """
    taken = inspect.signature(model.forward).parameters
    count, before = tokens.shape[1], tokens[:, :-1]
    if model.config.is_encoder_decoder:
        start = torch.full_like(tokens[:, :1], model.generation_config.decoder_start_token_id)
        given = {**inputs, "decoder_input_ids": torch.cat((start, before), 1)}
    else:
        mask = torch.cat((inputs["attention_mask"], torch.ones_like(before)), 1)
        given = {"input_ids": torch.cat((inputs["input_ids"], before), 1), "attention_mask": mask}
        if "position_ids" in taken:
            given["position_ids"] = counted_positions(mask)
    keep = {"logits_to_keep": count} if "logits_to_keep" in taken else {}
    with torch.inference_mode():
        logits: torch.Tensor = model(**given, **keep).logits
    return logits[:, -count:]


def counted_positions(mask: torch.Tensor) -> torch.Tensor:
    """The position of every token [batch, sequence] as `generate` counts: real tokens before it."""
    return (mask.cumsum(-1) - 1).clamp(min=0)
