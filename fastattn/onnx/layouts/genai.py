"""onnxruntime-genai: `Model(folder)` and its `Generator`, for decoders.

`genai_config.json` names the graph's inputs and outputs, the sizes of its cache and the defaults of the
search.
"""

from __future__ import annotations

from typing import Any

from fastattn.onnx.graph_spec import Source, one_or_list
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["CONFIG", "refusal", "write"]

CONFIG = "genai_config.json"

# Its options of an execution provider, by ONNX Runtime's name of the provider.
_PROVIDERS: dict[str, list[dict[str, Any]]] = {
    "CPUExecutionProvider": [],
    "CUDAExecutionProvider": [{"cuda": {}}],
}

# Where neither the config nor the generation config says how many positions there are.
_UNBOUNDED = 4096


def refusal(source: Source, target: Target) -> str | None:
    if source.kind != "decoder" or source.cache is None:
        return f"onnxruntime-genai generates with decoders, and this is an export of kind {source.kind!r}"
    sizes = {name: source.cache[name] for name in ("kv_heads", "key_dim", "value_dim")}
    if pruned := _pruned_heads(source):
        sizes["query_heads"] = one_or_list(pruned)
    if any(isinstance(size, list) for size in sizes.values()) or sizes["key_dim"] != sizes["value_dim"]:
        return (
            f"onnxruntime-genai has one cache shape for keys, values and all layers; this model has {sizes}"
        )
    return None


def _pruned_heads(source: Source) -> list[int]:
    """The query heads of every layer of a pruned model, of which the configuration has no one number."""
    shapes = getattr(source.config, "fastattn_pruning", None) or {"attention": {}}
    return [each["heads"] for each in shapes["attention"].values()]


def write(context: LayoutContext) -> None:
    source, graph = context.source, context.manifest["graphs"]["model"]
    cache = source.cache
    assert cache is not None
    config = source.config.to_dict()  # type: ignore[union-attr]
    pruned = _pruned_heads(source)
    generation = {} if source.generation_config is None else source.generation_config.to_dict()
    names = {each["name"] for each in graph["inputs"]}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    longest = max((bound for each in graph["inputs"] for bound in each["bounds"].values()), default=None)
    # "decoder" is its word for any decoder with the usual inputs; for "gpt2" it expects inputs of its own.
    model = {
        "type": "decoder",
        "vocab_size": config["vocab_size"],
        "context_length": longest or config.get("max_position_embeddings") or _UNBOUNDED,
        **_special_tokens(config, generation),
        "decoder": {
            "session_options": {
                "log_id": "onnxruntime-genai",
                "provider_options": _PROVIDERS[context.target.provider],
            },
            "filename": graph["file"],
            "head_size": cache["key_dim"],
            "hidden_size": source.config.hidden_size,  # type: ignore[union-attr]
            "num_attention_heads": (
                pruned[0] if pruned else source.config.num_attention_heads  # type: ignore[union-attr]
            ),
            "num_hidden_layers": cache["layers"],
            "num_key_value_heads": cache["kv_heads"],
            "inputs": {
                **inputs,
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    context.write_json(
        CONFIG, {"model": model, "search": _search(model["context_length"], generation, context)}
    )


def _special_tokens(config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.get(name)
        found[name] = config.get(name) if value is None else value
    end = found["eos_token_id"]
    if found["pad_token_id"] is None:
        found["pad_token_id"] = (end[0] if isinstance(end, list) else end) or 0
    return {name: value for name, value in found.items() if value is not None}


def _search(longest: int, generation: dict[str, Any], context: LayoutContext) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "do_sample": False,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
    }
    given = {name: generation[name] for name in defaults if generation.get(name) is not None}
    # One buffer for a layer's past and present, longer than what is in it: only ONNX Runtime's own operator
    # takes that, so every layer must have become one.
    layers, fusions = context.manifest["cache"]["layers"], context.manifest["graphs"]["model"]["fusions"]
    shared = fusions.get("cached_attention", 0) == layers
    return {
        "max_length": longest,
        "min_length": 0,
        "early_stopping": True,
        "past_present_share_buffer": shared,
        **{**defaults, **given},
    }
