"""An exported encoder-decoder in ONNX Runtime against the untouched model in PyTorch: the encoder, a prompt
of several tokens, and steps on the caches that came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.onnx.graph_spec import Source
from fastattn.verification import CaseResult, adversarial_batches, lone_padding
from fastattn.verification.comparison import compare

__all__ = ["results"]

Batch = dict[str, Tensor]
Run = Callable[..., Mapping[str, Tensor]]

# Tokens decoded one at a time after the prompt.
_STEPS = 2


def results(encode: Run, decode: Run, source: Source) -> Iterator[CaseResult]:
    """The encoder's output at real positions; logits and caches of the prompt and of every step; a row of
    nothing but padding must be finite and change no other.

    Args:
        encode, decode: the two graphs.
        source: what they were made of.
    """
    drawn = {case: _taken(batch) for case, batch in adversarial_batches(source.reference).items()}
    for case, batch in drawn.items():
        yield from _compared(case, encode, decode, source, batch)
    padded = drawn.get("right padding", {})
    if "attention_mask" in padded:
        yield from lone_padding(lambda batch: _first_logits(encode, decode, source, batch), padded)


def _taken(batch: Mapping[str, Tensor]) -> Batch:
    """Without a mask of the decoder's tokens, which the graphs do not take: every one of them is real."""
    return {name: x for name, x in batch.items() if name != "decoder_attention_mask"}


def _compared(case: str, encode: Run, decode: Run, source: Source, batch: Batch) -> Iterator[CaseResult]:
    reference: Any = source.reference
    sounds = {name: x for name, x in batch.items() if name != "decoder_input_ids"}
    mask = batch.get("attention_mask")

    def masks(name: str) -> Tensor | None:
        """Rows of a cache of the encoder's are real where its input is; all of the decoder's are."""
        return mask if ".encoder." in name or name == "last_hidden_state" else None

    with torch.no_grad():
        expected = {"last_hidden_state": reference.get_encoder()(**sounds).last_hidden_state}
    found = dict(encode(**sounds))
    yield from compare(case, found, expected, masks)
    tokens = batch["decoder_input_ids"]
    prompt = max(1, tokens.shape[1] - _STEPS)
    cache: Any = None
    given = first_inputs(source, found["last_hidden_state"], mask)
    for start, end in [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]:
        with torch.no_grad():
            answer = reference(
                **({} if mask is None else {"attention_mask": mask}),
                encoder_outputs=(expected["last_hidden_state"],),
                decoder_input_ids=tokens[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
        cache = answer.past_key_values
        found = dict(decode(**given, input_ids=tokens[:, start:end].contiguous()))
        where = f"{case}, {'prompt' if start == 0 else f'token {end}'}"
        wanted = {"logits": answer.logits, **_present(cache)}
        rows = {name: x.transpose(1, 2) if x.dim() == 4 else x for name, x in found.items()}
        yield from compare(where, rows, wanted, masks)
        given |= {
            name.replace("present", "past_key_values"): x for name, x in found.items() if name != "logits"
        }
        given["use_cache_branch"] = torch.tensor([True])


def _present(cache: Any) -> dict[str, Tensor]:
    """The reference's caches under the graph's names, [B, S, H, D]."""
    sides = {"decoder": cache.self_attention_cache, "encoder": cache.cross_attention_cache}
    return {
        f"present.{index}.{side}.{kind}": getattr(layer, f"{kind}s").transpose(1, 2)
        for side, held in sides.items()
        for index, layer in enumerate(held.layers)
        for kind in ("key", "value")
    }


def first_inputs(source: Source, states: Tensor, mask: Tensor | None) -> Batch:
    """The decoder's inputs but its tokens before there is any cache."""
    spec = source.graphs[-1]
    given = {"encoder_hidden_states": states, "use_cache_branch": torch.tensor([False])}
    if mask is not None:
        given["encoder_attention_mask"] = mask
    for name, sizes in spec.dimensions.items():
        if name.startswith("past_key_values."):
            given[name] = torch.zeros(
                len(states), *(size if isinstance(size, int) else 0 for size in sizes[1:])
            )
    return given


def _first_logits(encode: Run, decode: Run, source: Source, batch: Mapping[str, Tensor]) -> Batch:
    """What the encoder and a prompt give."""
    given = {name: x for name, x in batch.items() if name != "decoder_input_ids"}
    states = encode(**given)["last_hidden_state"]
    inputs = first_inputs(source, states, batch.get("attention_mask"))
    found = decode(**inputs, input_ids=batch["decoder_input_ids"])
    return {"last_hidden_state": states, "decoder_logits": found["logits"]}
