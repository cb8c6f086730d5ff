"""optimum: `ORTModelFor...from_pretrained(folder)`, in an environment of its own with transformers 4.

optimum finds graphs by the names every export gives them. What differs is what transformers 4 expects of
config.json and tokenizer_config.json as transformers 5 writes them: keys that moved are written in both
places.
"""

from __future__ import annotations

from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["refusal", "with_old_rope", "with_old_tokenizer", "write"]

# ORTModelFor...'s tasks, in optimum's words.
_TASKS = (
    *("feature-extraction", "fill-mask", "text-classification", "token-classification", "question-answering"),
    *("multiple-choice", "text-generation", "text2text-generation", "automatic-speech-recognition"),
    *("image-classification", "sentence-similarity"),
)


def refusal(source: Source, target: Target) -> str | None:
    if source.config is None:
        return "optimum's ORTModel classes are for models of transformers, and this is a module of your own"
    task = (source.task or "").removesuffix("-with-past")
    if task not in _TASKS:
        return (
            f"optimum has no ORTModel class for the task {source.task!r}; it has them for {', '.join(_TASKS)}"
        )
    return None


def write(context: LayoutContext) -> None:
    config = context.read_json("config.json")
    context.write_json("config.json", with_old_rope(config))
    tokenizer = context.read_json("tokenizer_config.json")
    if tokenizer:
        context.write_json("tokenizer_config.json", with_old_tokenizer(tokenizer))


def with_old_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The config with the rotary parameters where transformers 4 looks too; else it takes defaults."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        # None, or one of every type of layer; their config classes in version 4 have a key each for those.
        return config
    moved = {"rope_theta": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        moved["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if config.get("model_type") in ("gpt_neox", "gpt_neox_japanese"):
            moved["rotary_pct"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        moved["rope_scaling"] = {name: x for name, x in rope.items() if name not in moved}
    return {**config, **moved}


def with_old_tokenizer(config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer's config with what transformers 4 cannot read said as it says it; 5 reads both."""
    changed = dict(config)
    # Version 4 has no class of these names; the tokenizer is in tokenizer.json.
    if changed.get("tokenizer_class") in ("TokenizersBackend", "PreTrainedTokenizerFast"):
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    # A list in version 5, a dictionary of something else in 4.
    if isinstance(changed.get("extra_special_tokens"), list):
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed
