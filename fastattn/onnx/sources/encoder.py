"""Encoders of text: BERT and its kin, padding-free where their positions allow it, with any head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import GraphSpec, Source
from fastattn.onnx.sources.copies import fused_and_reference
from fastattn.onnx.sources.promises import traced_operations
from fastattn.onnx.sources.tasks import infer_task
from fastattn.verification.batches import forward_parameters
from fastattn.verification.comparison import named_tensors

__all__ = [
    "checked_example",
    "defaults",
    "inputs_of",
    "limits_of",
    "only_tensors",
    "prepare",
    "text_example",
    "value_limits",
]


def prepare(model: nn.Module, task: str | None, example_inputs: Mapping[str, Tensor] | None) -> Source:
    """Check that `model` can be exported and make the copies; `model` itself is not touched.

    Raises:
        TypeError, ValueError: what is wrong with the model, the task or the example.
    """
    found = infer_task(model, task)
    config: Any = model.config
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            "the model attends to an encoder's output (config.add_cross_attention), and its graph has no "
            "input for that; load the model with add_cross_attention=False"
        )
    fused, reference = fused_and_reference(model)
    original: Any = type(config).from_dict(reference.config.to_dict())  # type: ignore[union-attr, operator]
    only_tensors(fused, reference)
    choices = ("choices",) if found == "multiple-choice" else ()
    dimensions = ("batch", *choices, "sequence")
    names, limits = inputs_of(reference), limits_of(reference)
    if example_inputs is None:
        inputs = text_example(config, names, dimensions, limits)
    else:
        inputs = checked_example(example_inputs, names, dimensions, limits)
    with torch.no_grad():
        outputs = tuple(named_tensors(reference(**inputs)))
    spec = GraphSpec(
        "model",
        fused,
        inputs,
        dict.fromkeys(inputs, dimensions),
        outputs,
        limits=limits,
        defaults=defaults(names),
        value_limits=value_limits(config, names),
        traced=traced_operations(fused),
    )
    return Source("encoder", found, type(model).__name__, original, fused, reference, (spec,))


def only_tensors(*models: nn.Module) -> None:
    """Only tensors leave a graph, under their names: no tuple of layers, no cache."""
    for model in models:
        config: Any = model.config
        config.return_dict = True
        config.output_hidden_states = config.output_attentions = False
        if hasattr(config, "use_cache"):
            config.use_cache = False


def inputs_of(model: nn.Module) -> tuple[str, ...]:
    """What the family's tokenizer gives: token types only where the model has more than one."""
    accepted = forward_parameters(model)
    has_types = "token_type_ids" in accepted and _types(model.config) > 1
    return ("input_ids", "attention_mask", *(["token_type_ids"] if has_types else []))


def limits_of(model: nn.Module) -> dict[str, int]:
    """The longest sequence, by the table of positions; none where positions are computed or relative."""
    tables = [
        # RoBERTa's positions start behind the padding index.
        module.num_embeddings - (module.padding_idx + 1 if module.padding_idx else 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and "position_embedding" in name.rpartition(".")[2]
    ]
    return {"sequence": min(tables)} if tables else {}


def value_limits(config: Any, names: tuple[str, ...]) -> dict[str, int]:
    """How many values an input may have."""
    found = {"input_ids": int(config.vocab_size), "token_type_ids": _types(config)}
    return {name: limit for name, limit in found.items() if name in names}


def defaults(names: tuple[str, ...]) -> dict[str, int]:
    """What stands in where a caller leaves an input out, as in the original."""
    return {
        name: default for name, default in {"attention_mask": 1, "token_type_ids": 0}.items() if name in names
    }


def _types(config: Any) -> int:
    return int(getattr(config, "type_vocab_size", 0) or 0)


def text_example(
    config: Any, names: tuple[str, ...], dimensions: tuple[str, ...], limits: Mapping[str, int]
) -> dict[str, Tensor]:
    """A batch with padding. No dimension is 1 or equal to another: either would be taken for fixed."""
    sizes = {"choices": 3, "sequence": min(limits.get("sequence", 11), 11)}
    shape = [sizes.get(name, 2) for name in dimensions]
    ids = torch.arange(torch.Size(shape).numel()).view(shape) % config.vocab_size
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, ..., shape[-1] // 2 :] = 0
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name] for name in names}


def checked_example(
    inputs: Mapping[str, Tensor],
    names: tuple[str, ...],
    dimensions: tuple[str, ...],
    limits: Mapping[str, int],
) -> dict[str, Tensor]:
    """The caller's batch on the CPU, in the graph's order.

    Raises:
        TypeError, ValueError: other names, dtypes or shapes than the graph takes.
    """
    if set(inputs) != set(names):
        raise ValueError(f"example_inputs has {sorted(inputs)}; it must have {', '.join(names)}")
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            raise TypeError(f"example_inputs[{name!r}] must be an int64 tensor")
    shapes = {tuple(tensor.shape) for tensor in inputs.values()}
    (shape,) = shapes if len(shapes) == 1 else ((),)
    longest = limits.get("sequence")
    too_long = longest is not None and bool(shape) and shape[-1] > longest
    if len(shape) != len(dimensions) or min(shape) < 2 or too_long or len(set(shape)) < len(shape):
        bound = "" if longest is None else f" and the sequence at most {longest}"
        raise ValueError(
            f"example_inputs must be int64 tensors of one shape [{', '.join(dimensions)}], every size at "
            f"least 2, no two equal{bound}; got "
            f"{', '.join(f'{name} {list(tensor.shape)}' for name, tensor in inputs.items())}"
        )
    return {name: inputs[name].cpu() for name in names}
