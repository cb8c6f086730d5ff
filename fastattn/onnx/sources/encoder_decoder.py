"""Encoder-decoders: of those that generate one graph of the encoder, one of the decoder with its caches in
and out; of all others one graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.cached_attention import lower_appends
from fastattn.onnx.cross_cache import move_into_branches
from fastattn.onnx.fusions import check_promised
from fastattn.onnx.graph_spec import GraphSpec, Source, one_or_list
from fastattn.onnx.last_positions import LOGITS_TO_KEEP, give_default
from fastattn.onnx.row_rewrites import compute_in_rows
from fastattn.onnx.sources.copies import fused_and_reference
from fastattn.onnx.sources.decoding_step import (
    CrossAttention,
    DecodingStep,
    EncoderPass,
    cross_attentions,
    past_heads,
)
from fastattn.onnx.sources.tasks import infer_task
from fastattn.onnx.sources.whole_encoder_decoder import whole_pass
from fastattn.onnx.targets import current_target

__all__ = ["GENERATING", "prepare"]

# Tasks whose answer a decoder writes token by token.
GENERATING = ("text2text-generation", "automatic-speech-recognition")

# Sizes of the examples: none is 1, no two that differ in name are equal.
_BATCH, _SOURCE, _PAST, _NEW, _CROSS = 2, 11, 5, 3, 7


def prepare(model: nn.Module, task: str | None, example_inputs: Mapping[str, Tensor] | None) -> Source:
    """Check that `model` can be exported and make the copies; `model` itself is not touched.

    Raises:
        TypeError, ValueError: what is wrong with the model, the task or the example.
    """
    found = infer_task(model, task)
    if example_inputs is not None:
        raise ValueError(
            f"example_inputs is given, but {type(model).__name__} says itself what it takes; leave it out"
        )
    config: Any = model.config
    fused, reference = fused_and_reference(model)
    original: Any = type(config).from_dict(reference.config.to_dict())  # type: ignore[union-attr, operator]
    for each in (fused, reference):
        each_config: Any = each.config
        # Only tensors leave a graph, under their names.
        each_config.return_dict = True
        each_config.output_hidden_states = each_config.output_attentions = False
    if found not in GENERATING:
        for part in (*fused.modules(), *reference.modules()):
            # T5's decoder has a config of its own.
            own: Any = getattr(part, "config", None)
            if own is not None:
                own.use_cache = False
        spec = whole_pass(fused, reference)
        return Source("encoder", found, type(model).__name__, original, fused, reference, (spec,))
    speech = found == "automatic-speech-recognition"
    return Source(
        "encoder-decoder",
        found,
        type(model).__name__,
        original,
        fused,
        reference,
        (_encoder(fused, config, speech), _decoder(fused, config, speech)),
        cache=_cache(fused),
        generation_config=getattr(model, "generation_config", None),
    )


def _encoder(fused: Any, config: Any, speech: bool) -> GraphSpec:
    outputs = ("last_hidden_state",)
    module = EncoderPass(fused.get_encoder())
    if speech:
        # The positions' table is as long as the sound must be.
        length = 2 * config.max_source_positions
        features = torch.randn(
            _BATCH, config.num_mel_bins, length, generator=torch.Generator().manual_seed(0)
        )
        dimensions: dict[str, tuple[str | int, ...]] = {
            "input_features": ("batch_size", config.num_mel_bins, length)
        }
        return GraphSpec("encoder_model", module, {"input_features": features}, dimensions, outputs)
    mask = torch.ones(_BATCH, _SOURCE, dtype=torch.int64)
    mask[0, _SOURCE // 2 :] = 0
    return GraphSpec(
        "encoder_model",
        module,
        {"input_ids": torch.full_like(mask, 3), "attention_mask": mask},
        dict.fromkeys(("input_ids", "attention_mask"), ("batch_size", "sequence")),
        outputs,
        limits=_longest(config, "max_position_embeddings"),
        defaults={"attention_mask": 1},
        value_limits={"input_ids": config.vocab_size},
    )


def _decoder(fused: Any, config: Any, speech: bool) -> GraphSpec:
    layers = cross_attentions(fused)
    inputs: dict[str, Tensor] = {}
    dimensions: dict[str, tuple[str | int, ...]] = {}
    if not speech:
        mask = torch.ones(_BATCH, _CROSS, dtype=torch.int64)
        mask[0, _CROSS // 2 :] = 0
        inputs["encoder_attention_mask"] = mask
        dimensions["encoder_attention_mask"] = ("batch_size", "encoder_sequence")
    inputs["input_ids"] = torch.full((_BATCH, _NEW), 3)
    dimensions["input_ids"] = ("batch_size", "sequence")
    width = config.d_model
    inputs["encoder_hidden_states"] = torch.zeros(_BATCH, _CROSS, width)
    dimensions["encoder_hidden_states"] = ("batch_size", "encoder_sequence", width)
    outputs = ["logits"]
    for index, (layer, own_heads) in enumerate(zip(layers, past_heads(fused), strict=True)):
        sides = {
            "decoder": (own_heads, "past_sequence", _PAST),
            "encoder": (layer.heads, "encoder_sequence_out", _SOURCE),
        }
        for side, (heads, name, length) in sides.items():
            for kind in ("key", "value"):
                cached = f"{index}.{side}.{kind}"
                inputs[f"past_key_values.{cached}"] = torch.zeros(_BATCH, heads, length, layer.head_dim)
                dimensions[f"past_key_values.{cached}"] = ("batch_size", heads, name, layer.head_dim)
                outputs.append(f"present.{cached}")
    inputs["use_cache_branch"] = torch.tensor([True])
    dimensions["use_cache_branch"] = (1,)
    inputs[LOGITS_TO_KEEP] = torch.tensor([0])
    dimensions[LOGITS_TO_KEEP] = (1,)
    vocabulary = getattr(config, "decoder_vocab_size", None) or config.vocab_size
    longest = _longest(config, "max_target_positions" if speech else "max_position_embeddings")
    return GraphSpec(
        "decoder_model_merged",
        DecodingStep(fused),
        inputs,
        dimensions,
        tuple(outputs),
        limits=longest,
        defaults={"encoder_attention_mask": 1, LOGITS_TO_KEEP: 0},
        value_limits={"input_ids": vocabulary},
        finish=partial(_finish, layers=layers),
    )


def _finish(model: Any, layers: list[CrossAttention]) -> dict[str, int]:
    give_default(model)
    moved, served = move_into_branches(model), lower_appends(model)
    compute_in_rows(model)
    # What has its kernel must have become it; other head sizes are attended plainly.
    kernel = current_target().contrib and all(each.head_dim % 8 == 0 for each in layers)
    found = {"cross_projections": moved, "cached_attention": served}
    check_promised({"cross_projections": 2 * len(layers), "cached_attention": kernel * len(layers)}, found)
    return found


def _longest(config: Any, name: str) -> dict[str, int]:
    """T5's positions are relative: its sequences have no longest."""
    longest = getattr(config, name, None)
    return {} if longest is None else {"sequence": int(longest)}


def _cache(fused: nn.Module) -> dict[str, Any]:
    layers = cross_attentions(fused)
    first = layers[0]
    return {
        "layers": len(layers),
        "kv_heads": one_or_list(past_heads(fused)),
        "cross_heads": one_or_list([layer.heads for layer in layers]),
        "key_dim": first.head_dim,
        "value_dim": first.head_dim,
    }
