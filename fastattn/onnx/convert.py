"""From a swapped model to an ONNX graph: trace, translate one to one, rewrite."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastattn.onnx.fusions import FusionError, check_promised, check_traced, checked_fusions, operations
from fastattn.onnx.graph import CONTRIB_DOMAIN
from fastattn.onnx.graph_spec import GraphSpec
from fastattn.onnx.rewrites import rewrite
from fastattn.onnx.targets import Target, current_target, using_target
from fastattn.onnx.translations import TRANSLATIONS
from fastattn.packing import data_dependent_shapes
from fastattn.verification.comparison import named_tensors

__all__ = ["Converted", "FusionError", "convert", "to_onnx", "trace"]


@dataclass(frozen=True)
class Converted:
    """A graph, and what is known of it now.

    Attributes:
        model: the graph and its weights, which are the traced model's own tensors.
        fusions: fused nodes by kind.
        dimensions: for every input its dimensions' names, or sizes where they are fixed.
        bounds: the largest size of a dimension, by its name, where it has one.
    """

    model: ir.Model
    fusions: dict[str, int]
    dimensions: dict[str, tuple[str | int, ...]]
    bounds: dict[str, int]


def convert(spec: GraphSpec, target: Target) -> Converted:
    """Trace, translate and rewrite one graph.

    Raises:
        FusionError: an operation did not become its fused form, or one that `spec` promises is missing.
        ValueError: an operation that cannot be exported (dropout above 0, an operator without a translation),
            or a dimension that the model fixes though `spec` says that it varies.
    """
    dynamic = {
        name: {
            index: torch.export.Dim.AUTO(max=spec.limits[size])
            if size in spec.limits
            else torch.export.Dim.AUTO
            for index, size in enumerate(sizes)
            if isinstance(size, str)
        }
        for name, sizes in spec.dimensions.items()
    }
    program = trace(_Tensors(spec.module, spec.inputs), spec.inputs, dynamic)
    check_traced(spec.traced, program)
    with using_target(target):
        model = to_onnx(program)
        found = checked_fusions(program, model)
        finished = {} if spec.finish is None else spec.finish(model)
    for name, count in finished.items():
        found[name] = found.get(name, 0) + count
    check_promised(spec.promised, found)
    for value in list(model.graph.initializers.values()):
        value.name = re.sub(r"^(module\.)+", "", str(value.name))
    names = _name_dimensions(spec, model)
    bounds = {name: limit for name, limit in spec.limits.items() if name in names.values()}
    for symbol, constraint in program.range_constraints.items():
        if str(symbol) in names and constraint.upper < 2**31:
            bounds[names[str(symbol)]] = int(constraint.upper)
    for value, name in zip(model.graph.outputs[: len(spec.outputs)], spec.outputs, strict=True):
        value.name = name
    values = {value.name: value for value in model.graph.inputs}
    dimensions = {
        name: tuple(size if isinstance(size, int) else str(size.value) for size in values[name].shape)
        for name in spec.inputs
    }
    return Converted(model, found, dimensions, bounds)


class _Tensors(nn.Module):
    """The module with its output tensors as one tuple, whatever holds them, and only the given inputs."""

    def __init__(self, module: nn.Module, names: Mapping[str, Any]) -> None:
        super().__init__()
        self.module = module
        parameters = [Parameter(_identifier(name), Parameter.POSITIONAL_OR_KEYWORD) for name in names]

        def forward(*args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...]:
            given = Signature(parameters).bind(*args, **kwargs).args
            return tuple(named_tensors(module(**dict(zip(names, given, strict=True)))).values())

        # torch.export asks the signature what the inputs are called.
        forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


def _identifier(name: str) -> str:
    return name.replace(".", "__")


def trace(model: nn.Module, inputs: Mapping[str, Tensor], dynamic_shapes: Mapping[str, Any]) -> Any:
    """`torch.export` of `model`, packing included: the number of real tokens is a symbol."""
    with torch.no_grad(), data_dependent_shapes(), _quiet():
        return torch.export.export(
            model,
            (),
            {_identifier(name): tensor for name, tensor in inputs.items()},
            dynamic_shapes={_identifier(name): sizes for name, sizes in dynamic_shapes.items()},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def to_onnx(program: Any) -> Any:
    """Translate an exported program for the current target and rewrite the graph.

    Raises:
        ValueError: an operation drops values, rotates float64, or has no translation.
    """
    _refuse_what_has_no_graph(program)
    try:
        with _quiet():
            translated = torch.onnx.export(
                program,
                custom_translation_table=TRANSLATIONS,
                opset_version=current_target().opset,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(_without_translation(error)) from error
    assert translated is not None
    model = translated.model
    rewrite(model)
    if current_target().contrib:
        model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)
    return model


def _refuse_what_has_no_graph(program: Any) -> None:
    for name, arguments in operations(program):
        if arguments.get("dropout_p", 0.0) > 0.0:
            raise ValueError(
                f"fastattn::{name} is traced with dropout_p={arguments['dropout_p']}: dropout cannot be "
                "exported; put the model in eval mode, or pass dropout_p=0.0"
            )
        if name == "quantized_linear" and arguments["scheme"] == "fp8":
            raise ValueError(
                "fastattn::quantized_linear with float8 weights has no operator that runtimes run; quantize "
                "with 'int8', 'int8-weight' or 'int4-weight', or export the model as it was before"
            )
        if name == "rotary" and arguments["query"].meta["val"].dtype == torch.float64:
            raise ValueError(
                "fastattn::rotary is traced in float64, and ONNX Runtime's operator computes in float32; "
                "convert the model to float32"
            )


def _name_dimensions(spec: GraphSpec, model: Any) -> dict[str, str]:
    """Give the dynamic dimensions the names of `spec` wherever a shape mentions them; symbol -> name.

    Raises:
        ValueError: the model fixes a dimension.
    """
    values = dict(zip(spec.inputs, model.graph.inputs, strict=False))
    names: dict[str, str] = {}
    for name, value in values.items():
        value.name = name
    for name, sizes in spec.dimensions.items():
        for size, wanted in zip(values[name].shape, sizes, strict=True):
            if not isinstance(wanted, str):
                continue
            symbol = None if isinstance(size, int) else size.value
            if symbol is None and not spec.fixes_sizes:
                raise ValueError(
                    f"{spec.name}: the model fixes the dimension {wanted!r} of {name} to the example's {size}"
                )
            if symbol is None or not symbol.isidentifier() or symbol in names:
                continue
            # What a source calls by one name is one size, though nothing in the graph may say so.
            shared = wanted in names.values() and spec.fixes_sizes
            names[symbol] = f"dimension_{len(names)}" if shared else wanted
    if not names:
        raise ValueError(
            "the module fixes the sizes of all its inputs to the example's; "
            "its forward must not read them as numbers"
        )
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    everywhere = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        everywhere.extend(node.outputs)
    for value in everywhere:
        if value.shape is None or value.shape.is_static():
            continue
        value.shape = ir.Shape(
            [
                size if isinstance(size, int) else ir.SymbolicDim(_renamed(pattern, names, size.value))
                for size in value.shape
            ]
        )
    return names


def _renamed(pattern: re.Pattern[str], names: Mapping[str, str], size: str | None) -> str | None:
    return None if size is None else pattern.sub(lambda match: names[match[0]], size)


def _without_translation(error: BaseException) -> str:
    """What the exporter could not translate, in a sentence."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__
    found = re.search(r"target=torch\.ops\.([\w.]+)", " ".join(messages))
    if found is None:
        return f"the model cannot be translated to ONNX: {messages[-1].strip().splitlines()[0]}"
    return (
        f"the model calls {found[1]}, which has no ONNX translation; write that part of its forward in other "
        "operations, or leave it out of the exported module"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on torchvision and on its own deprecations."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
