"""From a swapped model to an ONNX graph: trace, translate one to one, rewrite, and count what was fused."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from inspect import Parameter, Signature
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastattn.onnx.dense_attention import within_fused_operator
from fastattn.onnx.graph import CONTRIB_DOMAIN, arguments_by_name
from fastattn.onnx.graph_spec import GraphSpec
from fastattn.onnx.rewrites import rewrite
from fastattn.onnx.targets import Target, current_target, using_target
from fastattn.onnx.translations import TRANSLATIONS
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.packing import data_dependent_shapes
from fastattn.verification.comparison import named_tensors

__all__ = ["Converted", "FusionError", "checked_fusions", "convert", "count_fusions", "to_onnx", "trace"]

_TERMS = frozenset(field.name for field in fields(AttentionTerms))


class FusionError(RuntimeError):
    """The graph does not hold the fused nodes that the model's operations should have become."""


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
        ValueError: an operation that cannot be exported (dropout above 0, an operator without a translation), or a
            dimension that the model fixes though `spec` says that it varies.
    """
    dynamic = {
        name: {
            index: torch.export.Dim.AUTO(max=spec.limits[size]) if size in spec.limits else torch.export.Dim.AUTO
            for index, size in enumerate(sizes)
            if isinstance(size, str)
        }
        for name, sizes in spec.dimensions.items()
    }
    program = trace(_Tensors(spec.module, spec.inputs), spec.inputs, dynamic)
    with using_target(target):
        model = to_onnx(program)
        found = checked_fusions(program, model)
        finished = {} if spec.finish is None else spec.finish(model)
    for name, count in finished.items():
        found[name] = found.get(name, 0) + count
    _check_promised(spec.promised, found)
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("module.")
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


def _operations(program: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and arguments of every fastattn operation in an exported program."""
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.name.startswith("fastattn::"):
            yield schema.name.removeprefix("fastattn::"), arguments_by_name(node.target, node.args)


def _refuse_what_has_no_graph(program: Any) -> None:
    for name, arguments in _operations(program):
        if arguments.get("dropout_p", 0.0) > 0.0:
            raise ValueError(
                f"fastattn::{name} is traced with dropout_p={arguments['dropout_p']}: dropout cannot be "
                "exported; put the model in eval mode, or pass dropout_p=0.0"
            )
        if name == "rotary" and arguments["query"].meta["val"].dtype == torch.float64:
            raise ValueError(
                "fastattn::rotary is traced in float64, and ONNX Runtime's operator computes in float32; "
                "convert the model to float32"
            )


def count_fusions(model: Any) -> dict[str, int]:
    """The fused forms in a graph, subgraphs included: how many of each.

    attention: MultiHeadAttention; packed_attention: those of them that run a sequence at a time;
    add_layer_norm: LayerNormalization of a Sum; bias_gelu: a GELU of a product that adds its own bias.
    """
    found = Counter(attention=0, packed_attention=0, add_layer_norm=0, bias_gelu=0)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.op_type == "MultiHeadAttention":
            found["attention"] += 1
            found["packed_attention"] += node.graph is not model.graph
        elif node.op_type == "LayerNormalization":
            found["add_layer_norm"] += _made_by(node.inputs[0]) == "Sum"
        elif node.op_type in ("Gelu", "FastGelu"):
            found["bias_gelu"] += _made_by(node.inputs[0]) == "Gemm"
    return dict(found)


def _made_by(value: Any) -> str | None:
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Unsqueeze", "Squeeze"):
        node = node.inputs[0].producer()
    return None if node is None else str(node.op_type)


def checked_fusions(program: Any, model: Any) -> dict[str, int]:
    """Every operation of the traced model that has a fused form must be there in that form."""
    wanted: Counter[str] = Counter()
    for name, arguments in _operations(program):
        if name in ("attention", "varlen_attention"):
            fused = _becomes_fused_attention(arguments)
            wanted["attention"] += fused
            wanted["packed_attention"] += name == "varlen_attention" and fused
        elif name in ("add_layer_norm", "bias_gelu"):
            wanted[name] += 1
    found = count_fusions(model)
    _check_promised(wanted, found)
    return found


def _check_promised(promised: Mapping[str, int], found: Mapping[str, int]) -> None:
    for name, count in promised.items():
        if found.get(name, 0) < count:
            raise FusionError(
                f"of the model's {count} {name} operations {found.get(name, 0)} became fused nodes; "
                "this is a defect of fastattn with this version of torch and onnxscript"
            )


def _becomes_fused_attention(arguments: Mapping[str, Any]) -> bool:
    """Whether the fused operator must be there: the arguments are within its reach, or nearly all are."""
    terms = AttentionTerms(**{name: x for name, x in arguments.items() if name in _TERMS})
    query, key, mask = (arguments.get(name) for name in ("query", "key", "mask"))
    assert query is not None and key is not None
    # A mask of four dimensions may hide keys by query, which the fused operator cannot.
    padding_mask = mask is None or mask.meta["val"].dim() == 2
    heads, key_heads = (x.meta["val"].shape[1] for x in (query, key))
    return within_fused_operator(terms) and padding_mask and bool(heads == key_heads)


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
            if symbol is None or not symbol.isidentifier() or not wanted.isidentifier() or symbol in names:
                continue
            names[symbol] = wanted if wanted not in names.values() else f"dimension_{len(names)}"
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
