"""sentence-transformers: `SentenceTransformer(folder, backend="onnx")`, which runs `onnx/model.onnx` through
optimum and pools by the modules described beside it.

The descriptions are in the form of version 5, which 6 reads too: it renamed modules and their options.
"""

from __future__ import annotations

from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["refusal", "write"]

# The modes of Pooling and version 5's flags for them.
_POOLING = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}


def refusal(source: Source, target: Target) -> str | None:
    if not hasattr(source.original, "encode"):
        return f"the model is a {source.architecture}; export the SentenceTransformer that holds it"
    return None


def write(context: LayoutContext) -> None:
    sentences: Any = context.source.original
    context.link_graph("model", "onnx/model.onnx")
    if context.tokenizer is None:
        sentences.tokenizer.save_pretrained(context.staging)
    described = []
    for index, (name, module) in enumerate(sentences.named_children()):
        kind = type(module).__name__
        path = "" if index == 0 else f"{index}_{kind}"
        described.append(
            {"idx": index, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
        if index == 0:
            context.write_json(
                "sentence_bert_config.json",
                {
                    "max_seq_length": sentences.max_seq_length,
                    "do_lower_case": bool(getattr(module, "do_lower_case", False)),
                },
            )
            continue
        folder = context.staging / path
        folder.mkdir()
        module.save(str(folder))
        if kind == "Pooling":
            context.write_json(f"{path}/config.json", _pooling(module))
    context.write_json("modules.json", described)
    context.write_json(
        "config_sentence_transformers.json",
        {
            "__version__": {},
            "prompts": sentences.prompts,
            "default_prompt_name": sentences.default_prompt_name,
            "similarity_fn_name": str(getattr(sentences, "similarity_fn_name", None) or "cosine"),
        },
    )


def _pooling(module: Any) -> dict[str, Any]:
    chosen = module.pooling_mode
    modes = (chosen,) if isinstance(chosen, str) else tuple(chosen)
    return {
        "word_embedding_dimension": module.embedding_dimension,
        **{flag: mode in modes for mode, flag in _POOLING.items()},
        "include_prompt": module.include_prompt,
    }
