"""Decoders: language models with their cache in and out, one graph for prefill and decoding."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastattn.models.dispatch import family_reason
from fastattn.onnx.cached_attention import fusable, lower_appends
from fastattn.onnx.decoder_rewrites import rewrite_decoder
from fastattn.onnx.fusions import FusionError
from fastattn.onnx.graph_spec import GraphSpec, Source, one_or_list
from fastattn.onnx.last_positions import LOGITS_TO_KEEP, give_default, keep_last_positions
from fastattn.onnx.rotary_rewrite import written_out
from fastattn.onnx.sources.copies import fused_and_reference
from fastattn.onnx.sources.graph_cache import IMPLEMENTATION, graph_cache
from fastattn.onnx.sources.rotary_tables import use_rotary_tables
from fastattn.onnx.sources.tasks import infer_task
from fastattn.onnx.targets import current_target
from fastattn.verification.batches import forward_parameters
from fastattn.verification.comparison import named_tensors

__all__ = ["past_names", "prepare", "present_names"]

# Of the example; no two sizes are equal, none is 1.
_BATCH, _TOKENS, _PAST = 2, 3, 4

_DEFECT = "this is a defect of fastattn with this version of torch and transformers"


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
    fused, reference = fused_and_reference(model)
    config: Any = fused.config
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"{type(model).__name__} has cross-attention (config.add_cross_attention), and a decoder's "
            "graph has no inputs for it; export the encoder-decoder it belongs to"
        )
    original: Any = type(config).from_dict(reference.config.to_dict())  # type: ignore[union-attr, operator]
    for each in (fused, reference):
        each_config: Any = each.config
        each_config.return_dict = True
        each_config.output_hidden_states = each_config.output_attentions = False
    if family_reason(type(config)) is None:
        config._attn_implementation = IMPLEMENTATION
    if hasattr(config, "num_local_experts"):
        # The chosen experts of every token in one product; the others' shapes depend on the router.
        config._experts_implementation = "batched_mm"
    longest = _longest(reference)
    use_rotary_tables(fused, longest)
    if found != "text-generation":
        return _without_cache(model, found, original, fused, reference, longest)
    module = _WithCache(fused, _takes_positions(reference))
    shapes = _cache_shapes(reference)
    inputs, dimensions = _inputs(module, shapes)
    layers = len(shapes)
    spec = GraphSpec(
        "model",
        module,
        inputs,
        dimensions,
        ("logits", *present_names(layers)),
        limits={} if longest is None else {"past_sequence + sequence": longest},
        defaults={LOGITS_TO_KEEP: 0},
        value_limits={
            "input_ids": config.vocab_size,
            **({"position_ids": longest} if longest and module.takes_positions else {}),
        },
        finish=partial(_finish, fusable=sum(fusable(key.shape[3], value.shape[3]) for key, value in shapes)),
    )
    return Source(
        "decoder",
        found,
        type(model).__name__,
        original,
        fused,
        reference,
        (spec,),
        cache={
            "layers": layers,
            "kv_heads": one_or_list([key.shape[1] for key, _ in shapes]),
            "key_dim": one_or_list([key.shape[3] for key, _ in shapes]),
            "value_dim": one_or_list([value.shape[3] for _, value in shapes]),
        },
        generation_config=getattr(model, "generation_config", None),
    )


def _without_cache(
    model: nn.Module, task: str, original: Any, fused: nn.Module, reference: nn.Module, longest: int | None
) -> Source:
    """A bare model, or one whose head reads a whole sequence: one pass, run as an encoder is."""
    for each in (fused, reference):
        each_config: Any = each.config
        each_config.use_cache = False
    config: Any = fused.config
    mask = torch.ones(_BATCH, _TOKENS + _PAST, dtype=torch.int64)
    mask[0, _PAST:] = 0
    ids = torch.arange(3, 3 + mask.numel()).view(mask.shape) % config.vocab_size
    pad = getattr(config, "pad_token_id", None)
    inputs = {"input_ids": ids if pad is None else ids.masked_fill(mask == 0, pad), "attention_mask": mask}
    with torch.no_grad():
        outputs = tuple(named_tensors(reference(**inputs)))
    spec = GraphSpec(
        "model",
        fused,
        inputs,
        dict.fromkeys(inputs, ("batch", "sequence")),
        outputs,
        limits={} if longest is None else {"sequence": longest},
        defaults={"attention_mask": 1},
        value_limits={"input_ids": config.vocab_size},
    )
    return Source("encoder", task, type(model).__name__, original, fused, reference, (spec,))


def past_names(layers: int) -> tuple[str, ...]:
    """The graph's cache inputs in order."""
    return tuple(f"past_key_values.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


def present_names(layers: int) -> tuple[str, ...]:
    """The graph's cache outputs in order."""
    return tuple(f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value"))


class _WithCache(nn.Module):
    """The model with its cache as tensors: logits, and present keys and values of every layer."""

    def __init__(self, model: nn.Module, takes_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = takes_positions

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: Tensor,
        position_ids: Tensor | None = None,
        **past: Tensor,
    ) -> tuple[Tensor, ...]:
        tensors = list(past.values())
        cache = graph_cache(list(zip(tensors[::2], tensors[1::2], strict=True)), attention_mask, input_ids)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        hook = head.register_forward_pre_hook(lambda _, args: (keep_last_positions(args[0], logits_to_keep),))
        try:
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                past_key_values=cache,
                use_cache=True,
                **positions,
            )
        finally:
            hook.remove()
        present: list[Tensor] = []
        for layer in cache.layers:
            assert layer.present is not None, "a layer did not ask the cache"
            present += layer.present
        return result[0], *present


def _cache_shapes(reference: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """The keys and values a forward of the original leaves in its cache, for what their heads are."""
    tokens = torch.ones(1, 2, dtype=torch.int64)
    with torch.no_grad():
        cache = reference(input_ids=tokens, attention_mask=tokens, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def _inputs(
    module: _WithCache, shapes: list[tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, tuple[str | int, ...]]]:
    """The example and the dimensions' names."""
    total = _PAST + _TOKENS
    mask = torch.ones(_BATCH, total, dtype=torch.int64)
    mask[0, :2] = 0
    inputs = {"input_ids": torch.arange(_BATCH * _TOKENS).view(_BATCH, _TOKENS), "attention_mask": mask}
    dimensions: dict[str, tuple[str | int, ...]] = {
        "input_ids": ("batch_size", "sequence"),
        "attention_mask": ("batch_size", "past_sequence + sequence"),
    }
    if module.takes_positions:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -_TOKENS:].contiguous()
        dimensions["position_ids"] = ("batch_size", "sequence")
    names = iter(past_names(len(shapes)))
    for pair in shapes:
        for each in pair:
            name, (_, heads, _, head_dim) = next(names), each.shape
            inputs[name] = torch.zeros(_BATCH, heads, _PAST, head_dim)
            dimensions[name] = ("batch_size", heads, "past_sequence", head_dim)
    inputs[LOGITS_TO_KEEP], dimensions[LOGITS_TO_KEEP] = torch.tensor([0]), (1,)
    return inputs, dimensions


def _takes_positions(model: nn.Module) -> bool:
    """Whether a caller numbers the tokens. Where none are given the first token's position is 0, padding or
    not; but OPT counts the real ones itself, and its graph does as well.
    """
    if "position_ids" not in forward_parameters(model):
        return False
    config: Any = model.config
    ids = torch.arange(3, 3 + _TOKENS)[None] % config.vocab_size
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    with torch.no_grad():
        itself = model(input_ids=ids, attention_mask=mask)[0][:, -1]
        given = model(input_ids=ids, attention_mask=mask, position_ids=torch.arange(_TOKENS)[None])[0][:, -1]
    return bool(torch.allclose(itself, given, rtol=1e-6, atol=1e-6))


def _longest(model: nn.Module) -> int | None:
    """How many positions the model has."""
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None)
    return None if longest is None else int(longest)


def _finish(model: ir.Model, fusable: int) -> dict[str, int]:
    """Raises FusionError where fewer than the `fusable` layers became one node over the cache."""
    give_default(model)
    rotated = sum(node.op_type == "RotaryEmbedding" for node in model.graph)
    served = lower_appends(model)
    contrib = current_target().contrib
    if served < fusable and contrib:
        raise FusionError(f"of {fusable} layers' attention {served} became GroupQueryAttention; {_DEFECT}")
    found = rewrite_decoder(model)
    if contrib and written_out(model):
        raise FusionError(f"rotary embedding is left written out {written_out(model)} times; {_DEFECT}")
    return {"cached_attention": served, "rotary": found["fuse_rotary"] + rotated}
