"""Greedy decoding and sampling, one token of every row at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.generation import EosTokenCriteria, MaxLengthCriteria

__all__ = ["Decoded", "decode"]

Array = np.ndarray[Any, Any]


@dataclass
class Decoded:
    """What came of a decoding loop.

    Attributes:
        sequences: int64 [batch, length], prompts included.
        scores, logits: float32 [batch, vocabulary] of every step, after and before the processors, where
            kept.
    """

    sequences: Tensor
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def decode(
    input_ids: Tensor,
    prefill: Callable[[], Array],
    step: Callable[[Array], Array],
    *,
    logits_processor: Any,
    stopping_criteria: Any,
    do_sample: bool,
    pad_token_id: Tensor | None,
    keep_scores: bool = False,
    keep_logits: bool = False,
    streamer: Any = None,
) -> Decoded:
    """Decode until the stopping criteria are met for every row, as transformers' greedy decoding and
    sampling do.

    Args:
        input_ids: int64 [batch, sequence] on the CPU.
        prefill: gives the first logits, [batch, vocabulary].
        step: gives the next ones after the tokens int64 [batch, 1]; both may overwrite the logits before.
        logits_processor, stopping_criteria: transformers' lists.
        do_sample: draw from the softmax of the scores with torch's generator, instead of taking the largest.
        pad_token_id: what rows that are done are filled with.
        streamer: gets every step's tokens.
    """
    # Greedy decoding looks at nothing but the largest logit, which numpy finds in place. torch would wake
    # its own threads for a vocabulary's worth of numbers, beside ONNX Runtime's, which still spin.
    largest_only = not (do_sample or keep_scores or keep_logits or len(logits_processor))
    pads = pad_token_id is not None and any(hasattr(each, "eos_token_id") for each in stopping_criteria)
    simple = _simple_criteria(stopping_criteria)
    unfinished = np.ones(input_ids.shape[0], np.bool_)
    decoded = Decoded(input_ids)
    new: list[Tensor] = []
    logits = prefill()
    while True:
        if largest_only:
            tokens = logits.argmax(-1)
        else:
            raw = torch.from_numpy(logits).to(torch.float32, copy=True)
            scores = logits_processor(decoded.sequences, raw)
            if keep_scores:
                decoded.scores.append(scores)
            if keep_logits:
                decoded.logits.append(raw)
            chosen = torch.multinomial(torch.softmax(scores, -1), 1)[:, 0] if do_sample else scores.argmax(-1)
            tokens = chosen.numpy()
        if pads and not unfinished.all():
            tokens = np.where(unfinished, tokens, int(pad_token_id))  # type: ignore[arg-type]
        new.append(torch.from_numpy(tokens)[:, None])
        if not (largest_only and simple):
            decoded.sequences = torch.cat((decoded.sequences, new.pop()), 1)
        if simple:
            unfinished &= ~simple(tokens, decoded.sequences.shape[1] + len(new))
        else:
            kept = tuple(decoded.scores) if keep_scores else None
            unfinished &= ~stopping_criteria(decoded.sequences, kept).numpy()
        if streamer is not None:
            streamer.put(torch.from_numpy(tokens))
        if not unfinished.any():
            break
        logits = step(tokens[:, None])
    if streamer is not None:
        streamer.end()
    if new:
        decoded.sequences = torch.cat((input_ids, *new), 1)
    return decoded


def _simple_criteria(stopping_criteria: Any) -> Callable[[Array, int], Array] | None:
    """A length and end tokens, looked at without tensors: those take several times as long, every token.

    Returns:
        What tells, of the last tokens [batch] and the length so far, which rows are done; None where there
        are other criteria.
    """
    if any(type(each) not in (MaxLengthCriteria, EosTokenCriteria) for each in stopping_criteria):
        return None
    lengths = [each.max_length for each in stopping_criteria if isinstance(each, MaxLengthCriteria)]
    ends = {int(x) for each in stopping_criteria if hasattr(each, "eos_token_id") for x in each.eos_token_id}
    longest = min(lengths, default=None)

    def done(tokens: Array, length: int) -> Array:
        if longest is not None and length >= longest:
            return np.ones(tokens.shape, np.bool_)
        return np.array([token in ends for token in tokens.tolist()])

    return done
