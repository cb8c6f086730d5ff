"""A module that is no Hugging Face model: what its example says about its inputs, dimensions and outputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastattn.onnx.graph_spec import GraphSpec, Source
from fastattn.onnx.sources.copies import fused_and_reference
from fastattn.verification.comparison import named_tensors

__all__ = ["DTYPES", "prepare"]

DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool"}


def prepare(model: nn.Module, task: str | None, example_inputs: Mapping[str, Tensor]) -> Source:
    """Check that `model` runs the example and make the copies; `model` itself is not touched.

    Raises:
        TypeError, ValueError: what is wrong with the model or the example.
    """
    if task is not None:
        raise ValueError(
            f"task is {task!r}, but {type(model).__name__} is no Hugging Face model; leave task out"
        )
    _check_example(example_inputs)
    inputs = {name: tensor.detach().cpu() for name, tensor in example_inputs.items()}
    fused, reference = fused_and_reference(model, must_swap=False)
    try:
        with torch.no_grad():
            outputs = named_tensors(fused(**inputs))
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} cannot be called with example_inputs by name "
            f"({', '.join(inputs)}): {error}"
        ) from error
    if not outputs:
        raise TypeError(f"{type(model).__name__} returns no tensor, and a graph returns nothing else")
    names = tuple(f"output_{name}" if name[0].isdigit() else name for name in outputs)
    spec = GraphSpec("model", fused, inputs, _dimensions(inputs), names, fixes_sizes=True)
    return Source("module", None, type(model).__name__, None, fused, reference, (spec,))


def _check_example(example: Mapping[str, Tensor]) -> None:
    for name, tensor in example.items():
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            found = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            accepted = ", ".join(DTYPES.values())
            raise TypeError(f"example_inputs[{name!r}] is {found}; it must be a tensor of {accepted}")
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in example.items())
    sizes = example[_leading(example)].shape[:2] if example else ()
    if len(sizes) < 2 or min(sizes) < 2 or sizes[0] == sizes[1]:
        raise ValueError(
            "example_inputs must tell batch and sequence apart: at least two sequences, of another length "
            f"than their number; got {shapes or 'nothing'}"
        )


def _leading(inputs: Mapping[str, Tensor]) -> str:
    """The input whose first two dimensions are batch and sequence (or, of features, the other way round):
    tables of tokens or masks before features, for those are [batch, sequence] whatever the layout of features
    is.
    """

    def rank(name: str) -> tuple[bool, bool]:
        features = inputs[name].is_floating_point()
        return features, inputs[name].dim() != (3 if features else 2)

    return min(inputs, key=rank)


def _dimensions(inputs: Mapping[str, Tensor]) -> dict[str, tuple[str | int, ...]]:
    """Every dimension as long as batch or sequence is that one; features, which come last, are not."""
    leading = _leading(inputs)
    names = dict(zip(inputs[leading].shape[:2], ("batch", "sequence"), strict=True))
    found: dict[str, tuple[str | int, ...]] = {}
    for name, tensor in {leading: inputs[leading], **inputs}.items():
        features = tensor.is_floating_point() and (tensor.dim() > 2 or name == leading)
        last = tensor.dim() - 1 if features else None
        found[name] = tuple(names.get(n, n) if i != last else n for i, n in enumerate(tensor.shape))
    return {name: found[name] for name in inputs}
