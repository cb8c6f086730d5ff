"""What is exported: a fused copy of the user's model, its reference, its inputs and its outputs' names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.swap import is_swapped, optimize, restore
from fastattn.verification import shared_copy

__all__ = ["INPUTS", "TASKS", "Source", "is_custom", "prepare", "private_copy"]

INPUTS = ("input_ids", "attention_mask", "token_type_ids")

# End of a model class's name -> what Hugging Face calls its task.
TASKS = {
    "Model": "feature-extraction",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMultipleChoice": "multiple-choice",
    "ForNextSentencePrediction": "next-sentence-prediction",
    "ForPreTraining": "pretraining",
}


@dataclass(frozen=True)
class Source:
    """The model as it is exported and as it is compared with; both share the user's parameters if they can.

    Attributes:
        fused: swapped, in eval mode.
        reference: the same weights on the original layers, in eval mode.
        config: the user's config, without any trace of the swap.
        inputs: the example batch, int64 [batch, sequence] or [batch, choices, sequence].
        dimensions: names of the inputs' dimensions.
        longest: largest sequence length.
        outputs: names of the outputs, the fields of the original's ModelOutput.
    """

    fused: nn.Module
    reference: nn.Module
    config: Any
    task: str
    inputs: dict[str, Tensor]
    dimensions: tuple[str, ...]
    longest: int
    outputs: tuple[str, ...]


def prepare(model: Any, task: str | None, example_inputs: Mapping[str, Tensor] | None) -> Source:
    """Check that `model` can be exported and make the copies; `model` itself is not touched.

    Raises:
        TypeError, ValueError: what is wrong with the model, the task or the example.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is accepted")
    found = _task(model)
    if task is not None and task != found:
        raise ValueError(
            f"task is {task!r}, but {type(model).__name__} has the head of {found!r}; leave task out"
        )
    config = model.config
    if getattr(config, "is_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            "the model is a decoder (config.is_decoder), whose cache this version cannot export; "
            "encoders can be exported"
        )
    reference = private_copy(model)
    restore(reference)
    original_config = copy.deepcopy(reference.config)
    fused = private_copy(model)
    if not is_swapped(fused):
        report = optimize(fused)
        if not report.swapped:
            raise ValueError(f"the model cannot be exported: {report.sites[0].reason}")
    for each in (fused, reference):
        each.eval()
        each_config: Any = each.config
        # Only tensors leave a graph, under their names: no tuple of layers, no cache.
        each_config.return_dict = True
        each_config.output_hidden_states = each_config.output_attentions = False
    choices = found == "multiple-choice"
    dimensions = ("batch", "choices", "sequence") if choices else ("batch", "sequence")
    longest = int(getattr(config, "max_position_embeddings", 512))
    if example_inputs is None:
        inputs = _example(config, dimensions, longest)
    else:
        _check_example(example_inputs, dimensions, longest)
        inputs = {name: example_inputs[name].cpu() for name in INPUTS}
    with torch.no_grad():
        outputs = tuple(reference(**inputs).keys())
    return Source(fused, reference, original_config, found, inputs, dimensions, longest, outputs)


def is_custom(model: Any) -> bool:
    """Whether `model` is a module of the user's own and no Hugging Face model."""
    return isinstance(model, nn.Module) and not hasattr(getattr(model, "config", None), "model_type")


def _task(model: nn.Module) -> str:
    name = type(model).__name__
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    for ending, task in TASKS.items():
        if kind == "bert" and name == f"Bert{ending}":
            return task
    accepted = ", ".join(f"Bert{ending}" for ending in TASKS)
    raise ValueError(
        f"the model is a {name}; this version exports {accepted}, and, with example_inputs, modules that are "
        "no Hugging Face models"
    )


def private_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU in float32; it shares the model's parameters where they are that already."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model has parameters on the meta device: load its weights before exporting")
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return shared_copy(model)
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32)


def _example(config: Any, dimensions: tuple[str, ...], longest: int) -> dict[str, Tensor]:
    """A batch with padding. No dimension is 1 or equal to another: either would be taken for fixed."""
    sizes = {"batch": 2, "choices": 3, "sequence": min(longest, 11)}
    shape = [sizes[name] for name in dimensions]
    ids = torch.arange(torch.Size(shape).numel()).view(shape) % config.vocab_size
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, ..., shape[-1] // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def _check_example(inputs: Mapping[str, Tensor], dimensions: tuple[str, ...], longest: int) -> None:
    if set(inputs) != set(INPUTS):
        raise ValueError(f"example_inputs has {sorted(inputs)}; it must have {', '.join(INPUTS)}")
    for name, tensor in inputs.items():
        if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
            raise TypeError(f"example_inputs[{name!r}] must be an int64 tensor")
    shapes = {tuple(tensor.shape) for tensor in inputs.values()}
    (shape,) = shapes if len(shapes) == 1 else ((),)
    if len(shape) != len(dimensions) or min(shape) < 2 or shape[-1] > longest:
        raise ValueError(
            f"example_inputs must be int64 tensors of one shape [{', '.join(dimensions)}], every size at "
            f"least 2 and the sequence at most {longest}; got "
            f"{', '.join(f'{name} {list(tensor.shape)}' for name, tensor in inputs.items())}"
        )
