"""From a swapped model to an ONNX graph: trace, translate one to one, rewrite, and count what was fused."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from fastattn.onnx.dense_attention import within_fused_operator
from fastattn.onnx.graph import CONTRIB_DOMAIN, arguments_by_name
from fastattn.onnx.rewrites import rewrite
from fastattn.onnx.translations import TRANSLATIONS
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.packing import data_dependent_shapes

__all__ = [
    "OPSET",
    "FusionError",
    "checked_fusions",
    "convert",
    "count_fusions",
    "rename_dimensions",
    "to_onnx",
    "trace",
]

# What torch exports; onnx's own default is newer than ONNX Runtime accepts, and web runtimes stop here too.
OPSET = 20

_TERMS = frozenset(field.name for field in fields(AttentionTerms))


class FusionError(RuntimeError):
    """The graph does not hold the fused nodes that the model's operations should have become."""


def convert(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    dimensions: Sequence[str],
    longest: int | None,
    outputs: Sequence[str],
) -> tuple[Any, dict[str, int]]:
    """Export `model` with dynamic shapes.

    Args:
        model: in eval mode; called with `inputs` as keyword arguments.
        inputs: example tensors, each with one dimension for every name in `dimensions`.
        dimensions: names of the inputs' dimensions, all dynamic.
        longest: largest size of the last dimension; None for no limit.
        outputs: names for the model's output tensors, in order.

    Returns:
        The `onnx_ir.Model`, and its fused nodes by kind.

    Raises:
        FusionError: an operation did not become its fused form.
        ValueError: an operation drops values (`dropout_p` above 0), which cannot be exported.
    """
    sizes = {
        index: torch.export.Dim(name, max=longest if index == len(dimensions) - 1 else None)
        for index, name in enumerate(dimensions)
    }
    program = trace(model, inputs, {name: sizes for name in inputs})
    onnx_model = to_onnx(program)
    first = next(iter(inputs))
    symbols = next(value.shape for value in onnx_model.graph.inputs if value.name == first)
    rename_dimensions(onnx_model, {str(s): name for s, name in zip(symbols, dimensions, strict=True)})
    for value, name in zip(onnx_model.graph.outputs, outputs, strict=True):
        value.name = name
    return onnx_model, checked_fusions(program, onnx_model)


def trace(model: nn.Module, inputs: Mapping[str, Tensor], dynamic_shapes: Any) -> Any:
    """`torch.export` of `model`, packing included: the number of real tokens is a symbol."""
    with torch.no_grad(), data_dependent_shapes(), _quiet():
        return torch.export.export(
            model,
            (),
            dict(inputs),
            dynamic_shapes=dynamic_shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def to_onnx(program: Any) -> Any:
    """Translate an exported program and rewrite the graph.

    Raises:
        ValueError: an operation drops values, or rotates float64.
    """
    _refuse_what_has_no_graph(program)
    with _quiet():
        translated = torch.onnx.export(
            program,
            custom_translation_table=TRANSLATIONS,
            opset_version=OPSET,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
    assert translated is not None
    model = translated.model
    rewrite(model)
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
    for name, count in wanted.items():
        if found[name] < count:
            raise FusionError(
                f"of the model's {count} {name} operations {found[name]} became fused nodes; "
                "this is a defect of fastattn with this version of torch and onnxscript"
            )
    return found


def _becomes_fused_attention(arguments: Mapping[str, Any]) -> bool:
    """Whether the fused operator must be there: the arguments are within its reach, or nearly all are."""
    terms = AttentionTerms(**{name: x for name, x in arguments.items() if name in _TERMS})
    query, key, mask = (arguments.get(name) for name in ("query", "key", "mask"))
    assert query is not None and key is not None
    # A mask of four dimensions may hide keys by query, which the fused operator cannot.
    padding_mask = mask is None or mask.meta["val"].dim() == 2
    heads, key_heads = (x.meta["val"].shape[1] for x in (query, key))
    return within_fused_operator(terms) and padding_mask and bool(heads == key_heads)


def rename_dimensions(model: Any, names: Mapping[str, str]) -> None:
    """Give the dynamic dimensions their names wherever a shape mentions them."""
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in names))
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        values.extend(node.outputs)
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        value.shape = ir.Shape(
            [
                size if isinstance(size, int) else ir.SymbolicDim(_renamed(pattern, names, size.value))
                for size in value.shape
            ]
        )


def _renamed(pattern: re.Pattern[str], names: Mapping[str, str], size: str | None) -> str | None:
    return None if size is None else pattern.sub(lambda match: names[match[0]], size)


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
