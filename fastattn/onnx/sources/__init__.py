"""From a user's model to the graphs to export: one file a kind of model."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from fastattn.onnx.graph_spec import Source

__all__ = ["exports_as", "prepare"]

# The architectures whose models read a text in both directions unless their config says otherwise.
_ENCODERS = (
    *(
        "albert",
        "bert",
        "deberta-v2",
        "distilbert",
        "electra",
        "modernbert",
        "mpnet",
        "roberta",
        "xlm-roberta",
    ),
    "clip_text_model",
)


def prepare(model: Any, task: str | None, example_inputs: Mapping[str, Tensor] | None) -> Source:
    """The graphs to make of `model`, which is not touched.

    Raises:
        TypeError, ValueError: what is wrong with the model, the task or the example.
    """
    prepared: Source = import_module(f"{__name__}.{exports_as(model, example_inputs)}").prepare(
        model, task, example_inputs
    )
    return prepared


def exports_as(model: Any, example_inputs: Mapping[str, Tensor] | None) -> str:
    """The file here for a model, by what its class and config say of it.

    Raises:
        TypeError, ValueError: the model is not one that exports with (or without) these inputs.
    """
    from fastattn.models import families_in, known_families
    from fastattn.onnx.sources.copies import is_custom
    from fastattn.verification.batches import forward_parameters

    if any(base.__name__ == "SentenceTransformer" for base in type(model).__mro__):
        return "sentence"
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is accepted")
    families = [] if is_custom(model) else [each for each in families_in(model) if each.name != "torch_nn"]
    if not families:
        if example_inputs is not None:
            return "module"
        names = ", ".join(name for name in known_families() if name != "torch_nn")
        raise ValueError(
            f"the model is a {type(model).__name__}; transformers models of these families are exported: "
            f"{names}; and any other module with example_inputs, its forward's arguments by name"
        )
    config: Any = model.config
    inputs = forward_parameters(model)
    if "pixel_values" in inputs:
        return "vision"
    if "decoder_input_ids" in inputs or "input_features" in inputs:
        return "encoder_decoder"
    # What is left of T5 without a decoder's inputs is its encoder.
    encodes = config.model_type in _ENCODERS or [each.name for each in families] == ["t5"]
    return "encoder" if encodes and not getattr(config, "is_decoder", False) else "decoder"
