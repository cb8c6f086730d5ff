"""A SentenceTransformer: its transformer, its pooling and what follows, in one graph."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import GraphSpec, Source
from fastattn.onnx.sources.copies import fused_and_reference
from fastattn.onnx.sources.encoder import (
    checked_example,
    defaults,
    inputs_of,
    limits_of,
    only_tensors,
    text_example,
    value_limits,
)
from fastattn.onnx.sources.promises import traced_operations

__all__ = ["prepare"]

_TASKS = ("feature-extraction", "sentence-similarity")
# What may follow the transformer: modules that compute from tokens' and sentences' embeddings alone.
_FOLLOWING = ("Pooling", "Normalize", "Dense", "LayerNorm", "Dropout")
_OUTPUTS = ("last_hidden_state", "sentence_embedding")


def prepare(model: Any, task: str | None, example_inputs: Mapping[str, Tensor] | None) -> Source:
    """Check that a SentenceTransformer can be exported and make the copies; `model` itself is not touched.

    Its outputs are the transformer's last_hidden_state, which loaders that pool for themselves read, and the
    sentence_embedding that `model.encode` returns.

    Raises:
        TypeError, ValueError: what is wrong with the model, the task or the example.
    """
    if task is not None and task.removesuffix("-with-past") not in (*_TASKS, "default"):
        raise ValueError(
            f"task is {task!r}, but a SentenceTransformer is for {' and '.join(map(repr, _TASKS))}; "
            "leave task out"
        )
    transformer, following = _parts(model)
    fused, reference = fused_and_reference(transformer)
    config: Any = reference.config
    original: Any = type(config).from_dict(config.to_dict())
    only_tensors(fused, reference)
    names, limits = inputs_of(reference), limits_of(reference)
    dimensions = ("batch", "sequence")
    if example_inputs is None:
        inputs = text_example(config, names, dimensions, limits)
    else:
        inputs = checked_example(example_inputs, names, dimensions, limits)
    embed, embed_reference = _Embedding(fused, following), _Embedding(reference, following)
    spec = GraphSpec(
        "model",
        embed,
        inputs,
        dict.fromkeys(inputs, dimensions),
        _OUTPUTS,
        limits=limits,
        defaults=defaults(names),
        value_limits=value_limits(config, names),
        traced=traced_operations(fused),
    )
    architecture = type(transformer).__name__
    return Source(
        "encoder", _TASKS[0], architecture, original, embed, embed_reference, (spec,), original=model
    )


class _Embedding(nn.Module):
    """Tokens to the embeddings of tokens and sentences."""

    def __init__(self, module: nn.Module, following: nn.Sequential) -> None:
        super().__init__()
        self.module, self.following = module, following
        self.config = module.config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        tokens = self.module(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        # ONNX Runtime finds the largest of 32-bit integers, not of 64-bit ones.
        features = self.following(
            {"token_embeddings": tokens, "attention_mask": attention_mask.to(torch.int32)}
        )
        return dict(zip(_OUTPUTS, (tokens, features["sentence_embedding"]), strict=True))


def _parts(model: Any) -> tuple[nn.Module, nn.Sequential]:
    """The transformers model inside, and private copies of the modules after it.

    Raises:
        ValueError: a part whose work cannot be put into one graph of tokens to embeddings.
    """
    first, *others = model.children()
    transformer = getattr(first, "auto_model", None)
    reads = getattr(first, "modality_config", {}).get("text", {})
    if transformer is None or type(first).__name__ != "Transformer":
        raise ValueError(
            f"the SentenceTransformer begins with a {type(first).__name__}; one that begins with a "
            "Transformer of texts can be exported"
        )
    if reads and (reads["method"], reads["method_output_name"]) != ("forward", "last_hidden_state"):
        raise ValueError(
            f"the SentenceTransformer takes {reads['method_output_name']!r} of its transformer's "
            f"{reads['method']}; one that takes last_hidden_state can be exported"
        )
    for module in others:
        if type(module).__name__ not in _FOLLOWING:
            raise ValueError(
                f"the SentenceTransformer has a {type(module).__name__}; {', '.join(_FOLLOWING)} can be "
                "exported after the transformer"
            )
        if not getattr(module, "include_prompt", True):
            raise ValueError(
                "the SentenceTransformer's Pooling leaves the prompt out (include_prompt=False), and the "
                "graph is not told how long that is; set include_prompt to True if no prompt is used, or "
                "export model[0].auto_model and pool its output yourself"
            )
    if not any(type(module).__name__ == "Pooling" for module in others):
        raise ValueError("the SentenceTransformer has no Pooling; export model[0].auto_model")
    copies = (copy.deepcopy(module).to(device="cpu", dtype=torch.float32).eval() for module in others)
    return transformer, nn.Sequential(*copies)
