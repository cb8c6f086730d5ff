"""Rewrites of the translated graph: an ordered table, each step counting what it changed.

They undo what only shows once operations stand side by side: views that cancel, and biases that a product can
add. onnxscript's own rewrite rules are left out: one of them gives two constants one name where Reshapes
share a shape (onnxscript 0.7), and what the others find ONNX Runtime finds when it loads the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import Sequential, common
from onnxscript.optimizer import fold_constants

from fastattn.onnx.quantized_translation import settle_zero_points

__all__ = ["REWRITES", "rewrite"]

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")


def rewrite(model: Any) -> dict[str, int]:
    """Fold constants, apply every rewrite in order, tidy up, in place; how often each matched, by name."""
    common.InlinePass()(model)
    fold_constants(model)
    counts = {step.__name__: step(model) for step in REWRITES}
    described = [(value.type, value.shape) for value in model.graph.outputs]
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.NameFixPass(),
    )(model)
    # An output that two nodes computed has no type any more once they are one (onnx_ir).
    for value, (value_type, shape) in zip(model.graph.outputs, described, strict=True):
        if value.type is None:
            value.type, value.shape = value_type, shape
    return counts


def cancel_transposes(model: Any) -> int:
    """Swapping two dimensions, dropping a leading 1 and swapping them back: only the 1 is dropped.

    Attention layers make [1, H, T, D] of a packed batch and the packed operation wants [T, H, D]. Each of the
    two transpositions would copy.
    """
    count = 0
    for node in list(model.graph):
        squeeze = _producer(node, "Squeeze") if _is_transpose(node, (1, 0, 2)) else None
        inner = _producer(squeeze, "Transpose") if squeeze is not None else None
        if squeeze is None or not _is_transpose(inner, (0, 2, 1, 3)) or _constant(squeeze.inputs[1]) != [0]:
            continue
        assert inner is not None
        _replace(node, "Squeeze", [inner.inputs[0], squeeze.inputs[1]])
        count += 1
    return count


def shorten_views(model: Any) -> int:
    """A Reshape to a shape written out needs none of the views before it."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Reshape":
            continue
        shape = _constant(node.inputs[1])
        if shape is None or 0 in shape:
            continue
        source = node.inputs[0]
        while source.producer() is not None and source.producer().op_type in _VIEWS:
            source = source.producer().inputs[0]
        if source is not node.inputs[0]:
            node.replace_input_with(0, source)
            count += 1
    return count


def join_products(model: Any) -> int:
    """The product with a weight is a Gemm over rows, to which `fold_biases` can add; transformers' Conv1D
    holds its weight the way MatMul takes it.
    """
    count = 0
    for node in list(model.graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None or len(weight.shape) != 2:
            continue
        x = node.inputs[0]
        rows = ir.node("Reshape", [x, _vector(model, -1, weight.shape[0])])
        product = ir.node("Gemm", [rows.outputs[0], weight])
        leading = ir.node("Shape", [x], attributes={"start": 0, "end": -1})
        shape = ir.node("Concat", [leading.outputs[0], _vector(model, -1)], attributes={"axis": 0})
        model.graph.insert_before(node, [rows, product, leading, shape])
        _replace(node, "Reshape", [product.outputs[0], shape.outputs[0]])
        count += 1
    return count


def fold_biases(model: Any) -> int:
    """The bias added to a product becomes the product's own: Gemm adds it without a pass over memory."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Add":
            continue
        product, bias = node.inputs
        view = product.producer()
        gemm = _producer(view, "Gemm") if view is not None and view.op_type in _VIEWS else view
        if gemm is None or gemm.op_type != "Gemm" or len(gemm.inputs) != 2 or bias.const_value is None:
            continue
        shared = len(gemm.outputs[0].uses()) > 1 or (view is not gemm and len(view.outputs[0].uses()) > 1)
        width = gemm.inputs[1].shape[0 if gemm.attributes.get_int("transB", 0) else 1]
        if shared or list(bias.shape) != [width] or product.shape is None or product.shape[-1] != width:
            continue
        biased = ir.node("Gemm", [*gemm.inputs, bias], attributes=dict(gemm.attributes))
        biased.outputs[0].shape, biased.outputs[0].type = gemm.outputs[0].shape, gemm.outputs[0].type
        model.graph.insert_before(node, biased)
        if view is gemm:
            _redirect(node, biased.outputs[0])
        else:
            _replace(node, view.op_type, [biased.outputs[0], *view.inputs[1:]], dict(view.attributes))
        count += 1
    return count


def _is_transpose(node: Any | None, perm: tuple[int, ...]) -> bool:
    return (
        node is not None and node.op_type == "Transpose" and tuple(node.attributes["perm"].as_ints()) == perm
    )


def _producer(node: Any, op_type: str) -> Any | None:
    """The node that makes the first input of `node`, if it is an `op_type`."""
    found = node.inputs[0].producer() if node.inputs[0] is not None else None
    return found if found is not None and found.op_type == op_type else None


def _constant(value: Any) -> list[int] | None:
    """The elements of a constant integer vector; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(x) for x in tensor.numpy().reshape(-1)]


def _vector(model: Any, *elements: int) -> Any:
    """A constant int64 vector."""
    node = ir.node("Constant", [], attributes={"value_ints": list(elements)})
    node.outputs[0].const_value = ir.tensor(elements, dtype=ir.DataType.INT64)
    model.graph.insert_before(model.graph[0], node)
    return node.outputs[0]


def _replace(node: Any, op_type: str, inputs: list[Any], attributes: dict[str, Any] | None = None) -> None:
    """Put a node with one output in the place of `node`."""
    replacement = ir.node(op_type, inputs, attributes=attributes)
    node.graph.insert_before(node, replacement)
    _redirect(node, replacement.outputs[0])


def _redirect(node: Any, value: Any) -> None:
    """Let everything that used the output of `node` use `value`, and take `node` out."""
    old = node.outputs[0]
    value.shape, value.type = old.shape, old.type
    value.name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)


REWRITES: tuple[Callable[[Any], int], ...] = (
    cancel_transposes,
    shorten_views,
    join_products,
    fold_biases,
    settle_zero_points,
)
