"""Export of a module that is no Hugging Face model: what its example says about its inputs, dimensions and
outputs, and the batches it is checked on.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastattn.onnx.convert import checked_fusions, rename_dimensions, to_onnx, trace
from fastattn.swap import is_swapped, optimize, restore
from fastattn.verification import VerificationError, VerificationReport
from fastattn.verification.comparison import compare_outputs, named_tensors
from fastattn.verification.subject import masks_of

__all__ = ["ModuleSource", "check_module_export", "convert_module", "prepare_module"]

DTYPES = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool"}
_NAMES = ("batch", "sequence")


class _Outputs(nn.Module):
    """The module with its output tensors as one tuple, whatever holds them, and only the given inputs."""

    def __init__(self, module: nn.Module, names: Iterable[str]) -> None:
        super().__init__()
        self.module = module
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]

        def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            given = Signature(parameters).bind(*args, **kwargs).arguments
            return tuple(named_tensors(module(**given)).values())

        # torch.export asks the signature what the inputs are called.
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


@dataclass
class ModuleSource:
    """The module as it is exported and as it is compared with; both share the user's parameters if they can.

    Attributes:
        fused: swapped, in eval mode.
        reference: the same weights on the original layers, in eval mode.
        inputs: the example batch.
        outputs: names of the outputs: "output", "output_0" and so on, or the keys the module gives them.
        dimensions: name (or size, where it is fixed) of every dimension of every input; known once exported.
        bounds: largest sizes of the dimensions that have one.
    """

    fused: nn.Module
    reference: nn.Module
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    dimensions: dict[str, list[str | int]]
    bounds: dict[str, int]


def prepare_module(model: nn.Module, task: str | None, example_inputs: Mapping[str, Tensor]) -> ModuleSource:
    """Check that `model` runs the example and make the copies; `model` itself is not touched.

    Raises:
        TypeError, ValueError: what is wrong with the model or the example.
    """
    from fastattn.onnx.source import private_copy

    if task is not None:
        raise ValueError(
            f"task is {task!r}, but {type(model).__name__} is no Hugging Face model; leave task out"
        )
    _check_example(example_inputs)
    inputs = {name: tensor.detach().cpu() for name, tensor in example_inputs.items()}
    reference, fused = private_copy(model), private_copy(model)
    restore(reference)
    if not is_swapped(fused):
        optimize(fused)
    reference.eval(), fused.eval()
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
    return ModuleSource(fused, reference, inputs, names, {}, {})


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


def _dynamic(inputs: Mapping[str, Tensor]) -> dict[str, dict[int, Any]]:
    """Every dimension as long as the batch or the sequence, but for features, which come last."""
    leading = _leading(inputs)
    sizes = set(inputs[leading].shape[:2])
    found: dict[str, dict[int, Any]] = {}
    for name, tensor in inputs.items():
        features = tensor.is_floating_point() and (tensor.dim() > 2 or name == leading)
        dims = tensor.shape[:-1] if features else tensor.shape
        found[name] = {i: torch.export.Dim.AUTO for i, size in enumerate(dims) if size in sizes}
    return found


def convert_module(source: ModuleSource) -> tuple[Any, dict[str, int]]:
    """Export with batch and sequence dynamic where the module does not fix them; fills in `dimensions` and
    `bounds`.

    Raises:
        FusionError: an operation did not become its fused form.
        ValueError: the module fixes every dimension.
    """
    program = trace(_Outputs(source.fused, source.inputs), source.inputs, _dynamic(source.inputs))
    model = to_onnx(program)
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("module.")
    values = dict(zip(source.inputs, model.graph.inputs, strict=True))
    names = _dimension_names(source.inputs, values)
    if not names:
        raise ValueError(
            "the module fixes the sizes of all its inputs to the example's; "
            "its forward must not read them as numbers"
        )
    for symbol, constraint in program.range_constraints.items():
        if str(symbol) in names and constraint.upper < 2**31:
            source.bounds[names[str(symbol)]] = int(constraint.upper)
    rename_dimensions(model, names)
    for name, value in values.items():
        value.name = name
        source.dimensions[name] = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    for value, name in zip(model.graph.outputs, source.outputs, strict=True):
        value.name = name
    return model, checked_fusions(program, model)


def _dimension_names(inputs: Mapping[str, Tensor], values: Mapping[str, ir.Value]) -> dict[str, str]:
    """Symbol -> name, the leading input's first."""
    leading = _leading(inputs)
    names: dict[str, str] = {}
    for name in (leading, *inputs):
        shape = values[name].shape
        assert shape is not None
        for size in shape:
            symbol = None if isinstance(size, int) else size.value
            if symbol is not None and symbol.isidentifier() and symbol not in names:
                names[symbol] = _NAMES[len(names)] if len(names) < 2 else f"dimension_{len(names)}"
    return names


def check_module_export(exported: Any, source: ModuleSource) -> VerificationReport:
    """The written file in ONNX Runtime against the module in PyTorch, swapped at every position, and as it
    was at real ones, on the example in other sizes.

    Raises:
        VerificationError: an output is too far off; the message names the worst case.
    """
    report = VerificationReport()
    for case, batch in _batches(source):
        with torch.no_grad():
            try:
                expected = _named(source, source.fused(**batch))
            except (RuntimeError, IndexError, ValueError):
                if case == "the example":
                    raise
                continue  # A size the module itself does not take.
            original = _named(source, source.reference(**batch))
        found = exported(**batch)
        report.results.extend(compare_outputs(f"{case}, swapped", found, expected, None))
        mask = masks_of(batch)("")
        if mask is not None or not any(x.dtype == torch.bool for x in batch.values()):
            report.results.extend(compare_outputs(case, found, original, mask))
    if not report.passed:
        raise VerificationError(report)
    return report


def _named(source: ModuleSource, result: Any) -> dict[str, Tensor]:
    return dict(zip(source.outputs, named_tensors(result).values(), strict=True))


def _batches(source: ModuleSource) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The example, and its rows and columns repeated or left out to other sizes."""
    example: dict[str, int] = {}
    for name, tensor in source.inputs.items():
        for size, dimension in zip(tensor.shape, source.dimensions[name], strict=True):
            if isinstance(dimension, str):
                example.setdefault(dimension, size)
    batch, length = (example.get(name, 2) for name in _NAMES)
    cases = {
        "the example": (batch, length),
        "one row": (1, length),
        "more rows": (batch + 3, length),
        "shorter": (batch, max(2, length // 2)),
        "longer": (batch, min(2 * length + 1, source.bounds.get("sequence", 2 * length + 1))),
        "batch == length": (min(batch, length), min(batch, length)),
        "length 1": (batch, 1),
    }
    for case, sizes in cases.items():
        wanted = {**example, **dict(zip(_NAMES, sizes, strict=True))}
        yield case, {name: _resized(x, source.dimensions[name], wanted) for name, x in source.inputs.items()}


def _resized(tensor: Tensor, dimensions: list[str | int], sizes: Mapping[str, int]) -> Tensor:
    for index, dimension in enumerate(dimensions):
        if isinstance(dimension, str) and dimension in sizes:
            rows = torch.arange(sizes[dimension]) % tensor.shape[index]
            tensor = tensor.index_select(index, rows)
    return tensor.contiguous()
