"""Encoder-decoders that answer in one pass: without a head, or with one that classifies or answers questions.
One graph, without a cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import GraphSpec
from fastattn.onnx.sources.decoding_step import without_causal_masks
from fastattn.verification.batches import forward_parameters
from fastattn.verification.comparison import named_tensors

__all__ = ["whole_pass"]

# Sizes of the example: none is 1, no two are equal.
_BATCH, _SOURCE, _TARGET = 2, 11, 5


def whole_pass(fused: Any, reference: Any) -> GraphSpec:
    """The graph of everything from the tokens to the head, and the encoder's last hidden state."""
    config: Any = fused.config
    takes = forward_parameters(fused)
    longest = getattr(config, "max_position_embeddings", None) or getattr(
        config, "max_target_positions", None
    )
    inputs: dict[str, Tensor] = {}
    dimensions: dict[str, tuple[str | int, ...]] = {}
    if "input_features" in takes:
        length = 2 * config.max_source_positions
        inputs["input_features"] = torch.ones(_BATCH, config.num_mel_bins, length)
        dimensions["input_features"] = ("batch", config.num_mel_bins, length)
    else:
        mask = torch.ones(_BATCH, _SOURCE, dtype=torch.int64)
        mask[0, _SOURCE // 2 :] = 0
        ids = torch.full_like(mask, 3)
        # A head that reads the last end of a text needs one.
        ids[:, 2] = config.eos_token_id
        inputs |= {"input_ids": ids, "attention_mask": mask}
        dimensions |= dict.fromkeys(inputs, ("batch", "sequence"))
    # Without a head the decoder's tokens are the caller's; the heads make them of the encoder's.
    if type(fused).__name__.endswith("Model"):
        inputs["decoder_input_ids"] = torch.full((_BATCH, _TARGET), 3)
        dimensions["decoder_input_ids"] = ("batch", "decoder_sequence")
    module = _LastEnd(fused) if hasattr(fused, "classification_head") else _Whole(fused)
    with torch.no_grad():
        outputs = tuple(named_tensors(reference(**inputs, **_without_cache(takes))))
    return GraphSpec(
        "model",
        module,
        inputs,
        dimensions,
        outputs,
        limits={} if longest is None else {"sequence": int(longest), "decoder_sequence": int(longest)},
        defaults={"attention_mask": 1},
        value_limits=dict.fromkeys({"input_ids", "decoder_input_ids"} & set(inputs), config.vocab_size),
    )


def _without_cache(takes: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in takes else {}


class _Whole(nn.Module):
    """The model as it is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        more = _decoder_tokens(self.model, inputs) | _without_cache(forward_parameters(self.model))
        with without_causal_masks(self.model):
            return named_tensors(self.model(**inputs, **more))


def _decoder_tokens(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What T5's and mBART's heads make of the encoder's tokens where no others are given: T5's model inside
    does not, and mBART's way of it fixes the number of rows.
    """
    ids = inputs.get("input_ids")
    if ids is None or "decoder_input_ids" in inputs or model.config.model_type not in ("t5", "mbart"):
        return {}
    if model.config.model_type == "t5":
        return {"decoder_input_ids": model._shift_right(ids)}
    # The language, a text's last token, comes first.
    last = ids.ne(model.config.pad_token_id).sum(1, keepdim=True) - 1
    return {"decoder_input_ids": torch.cat((ids.gather(1, last), ids[:, :-1]), dim=1)}


class _LastEnd(_Whole):
    """A head that reads the decoder's state at a text's last end-of-sequence token.

    As the original's, whose forward refuses rows of unlike numbers of such tokens, which a graph cannot; each
    row's last one is read here, the first token's state where a row has none.
    """

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        model: Any = self.model
        ids = inputs["input_ids"]
        more = _decoder_tokens(model, inputs)
        with without_causal_masks(model):
            result = model.base_model(**inputs, **more, use_cache=False)
        numbers = torch.arange(1, ids.shape[1] + 1)
        last = (ids.eq(model.config.eos_token_id) * numbers).argmax(1)
        states = result.last_hidden_state[torch.arange(ids.shape[0]), last]
        return {
            "logits": model.classification_head(states),
            "encoder_last_hidden_state": result.encoder_last_hidden_state,
        }
