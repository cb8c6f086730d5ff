"""Rewrites of a decoder's graph, whose steps of one token are so short that every node counts: no view
between the products, one projection of query, key and value where the layer makes them so, no transposition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import Sequential, common

from fastattn.onnx.rewrites import shorten_views
from fastattn.onnx.rewriting import int_vector, redirect
from fastattn.onnx.rotary_rewrite import fuse_rotary, rotate_length_major

__all__ = ["rewrite_decoder"]

_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")

# Each row of the output depends on the same row of the inputs alone.
_ROWWISE = frozenset(
    (
        *(
            "Add",
            "Sum",
            "Sub",
            "Mul",
            "Div",
            "Pow",
            "Sqrt",
            "Reciprocal",
            "Neg",
            "Sigmoid",
            "Tanh",
            "Relu",
            "Erf",
        ),
        *("Gelu", "FastGelu", "QuickGelu", "LayerNormalization", "ReduceMean", "Cast", "Max", "Min", "Clip"),
    )
)


def rewrite_decoder(model: Any) -> dict[str, int]:
    """Apply every rewrite in order, in place; how often each matched, by name."""
    counts: dict[str, int] = {}
    for step in _STEPS:
        counts[step.__name__] = counts.get(step.__name__, 0) + step(model)
        common.RemoveUnusedNodesPass()(model)
    Sequential(
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.NameFixPass(),
    )(model)
    return counts


def widen_bfloat16(model: Any) -> int:
    """Products in bfloat16 (Falcon's ALiBi), which ONNX Runtime's CPU has no kernel for, in float32: exact,
    and rounded to bfloat16 as before.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "Mul" or node.outputs[0].dtype != ir.DataType.BFLOAT16:
            continue
        wide = [ir.node("Cast", [x], attributes={"to": int(ir.DataType.FLOAT)}) for x in node.inputs]
        product = ir.node("Mul", [each.outputs[0] for each in wide])
        rounded = ir.node("Cast", product.outputs, attributes={"to": int(ir.DataType.BFLOAT16)})
        model.graph.insert_before(node, [*wide, product, rounded])
        redirect(node, rounded.outputs[0])
        count += 1
    return count


def cancel_swaps(model: Any) -> int:
    """Two transpositions that undo each other."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "Transpose":
            continue
        inner = node.inputs[0].producer()
        if inner is None or inner.op_type != "Transpose":
            continue
        first, second = (list(each.attributes["perm"].as_ints()) for each in (inner, node))
        if [first[i] for i in second] != list(range(len(first))):
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], inner.inputs[0])
        model.graph.remove(node, safe=True)
        count += 1
    return count


def skip_views(model: Any) -> int:
    """A view of the shape that the value had before earlier views is that value."""
    count = 0
    for node in list(model.graph):
        out = node.outputs[0] if node.op_type in _VIEWS else None
        if out is None or out.shape is None or out.is_graph_output():
            continue
        source = node.inputs[0]
        while source is not None and (source.shape is None or source.shape != out.shape):
            producer = source.producer()
            source = producer.inputs[0] if producer is not None and producer.op_type in _VIEWS else None
        if source is None:
            continue
        ir.convenience.replace_all_uses_with(out, source)
        model.graph.remove(node, safe=True)
        count += 1
    return count


def pack_projections(model: Any) -> int:
    """Query, key and value split from one product go to GroupQueryAttention as that product."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention" or node.inputs[1] is None:
            continue
        split = node.inputs[0].producer()
        if split is None or split.op_type != "Split" or list(split.outputs) != list(node.inputs[:3]):
            continue
        if node.inputs[0].shape is None or split.attributes.get_int("axis", 0) not in (-1, 2):
            continue
        node.replace_input_with(0, split.inputs[0])
        node.replace_input_with(1, None)
        node.replace_input_with(2, None)
        count += 1
    return count


def ask_the_tokens(model: Any) -> int:
    """Batch and sequence are read from the tokens alone, so that no value is made to be measured."""
    tokens = model.graph.inputs[0]
    count = 0
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Shape" else None
        if value is None or value is tokens or value.shape is None or len(value.shape) != 3:
            continue
        start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 3)
        if end < 0:
            end += 3
        if start < 0 or end > 2 or list(value.shape)[:2] != list(tokens.shape):
            continue
        node.replace_input_with(0, tokens)
        node.attributes["start"] = ir.AttrInt64("start", start)
        node.attributes["end"] = ir.AttrInt64("end", end)
        count += 1
    return count


def keep_rows(model: Any) -> int:
    """From the embeddings to the head everything between products works on rows [B * S, N], as the products
    do: no view between them.
    """
    tokens = model.graph.inputs[0]
    rows: dict[Any, Any] = {}
    count = 0
    for node in list(model.graph):
        out = node.outputs[0]
        if node.op_type == "Reshape" and _is_matrix(node.inputs[0]) and _viewed_per_token(node, tokens):
            rows[out] = node.inputs[0]
        elif node.op_type == "Gather" and _per_token(out, tokens) and len(node.inputs[0].shape) == 2:
            _view_as_rows(model, node, rows)
        elif node.op_type == "Reshape" and node.inputs[0] in rows and _is_matrix(out):
            ir.convenience.replace_all_uses_with(out, rows[node.inputs[0]])
            model.graph.remove(node, safe=True)
            count += 1
        elif node.op_type in _ROWWISE and any(x in rows for x in node.inputs):
            count += _on_rows(model, node, rows)
    return count


def _per_token(value: Any, tokens: Any) -> bool:
    return value.shape is not None and len(value.shape) == 3 and list(value.shape)[:2] == list(tokens.shape)


def _viewed_per_token(node: Any, tokens: Any) -> bool:
    """Whether a Reshape makes [B, S, N]: it says so, or takes B and S from the tokens."""
    if node.outputs[0].shape is not None:
        return _per_token(node.outputs[0], tokens)
    joined = node.inputs[1].producer()
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return False
    leading = joined.inputs[0].producer()
    return bool(
        leading is not None
        and leading.op_type == "Shape"
        and leading.inputs[0] is tokens
        and (leading.attributes.get_int("start", 0), leading.attributes.get_int("end", 2)) == (0, 2)
    )


def _is_matrix(value: Any) -> bool:
    """Whether a value is rows of all tokens; what translations made has no shape, but is what a Gemm reads or
    gives.
    """
    if value.shape is not None:
        return len(value.shape) == 2
    producer = value.producer()
    if producer is not None and producer.op_type == "Gemm":
        return True
    return any(use.node.op_type == "Gemm" and use.idx == 0 for use in value.uses())


def _view_as_rows(model: Any, node: Any, rows: dict[Any, Any]) -> None:
    """Embeddings are the first rows; without uses the views go again."""
    out = node.outputs[0]
    flat = ir.node("Reshape", [out, int_vector(model, -1, out.shape[2])])
    flat.outputs[0].type = out.type
    flat.outputs[0].shape = ir.Shape([None, out.shape[2]])
    model.graph.insert_after(node, flat)
    rows[out] = flat.outputs[0]


def _on_rows(model: Any, node: Any, rows: dict[Any, Any]) -> int:
    """Let `node` work on rows where all its inputs are such, constants aside."""
    for x in node.inputs:
        if x is None or x in rows:
            continue
        if x.const_value is None or len(x.const_value.shape) > 1:
            return 0
    if node.op_type == "ReduceMean":
        axes = ir.convenience.get_const_tensor(node.inputs[1])
        if axes is None or axes.numpy().tolist() != [-1] or node.attributes.get_int("keepdims", 1) != 1:
            return 0
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) != -1:
        return 0
    if len(node.outputs) != 1:
        return 0
    out = node.outputs[0]
    small = ir.node(
        node.op_type,
        [rows.get(x, x) for x in node.inputs],
        domain=node.domain,
        attributes=dict(node.attributes),
    )
    small.outputs[0].type = out.type
    first = next(x for x in node.inputs if x in rows)
    shape = ir.node("Shape", [first], attributes={"start": 0, "end": 2})
    joined = ir.node("Concat", [shape.outputs[0], int_vector(model, -1)], attributes={"axis": 0})
    back = ir.node("Reshape", [small.outputs[0], joined.outputs[0]])
    if out.shape is not None:
        small.outputs[0].shape = ir.Shape([None, out.shape[2]])
    model.graph.insert_before(node, [small, shape, joined, back])
    redirect(node, back.outputs[0])
    rows[back.outputs[0]] = small.outputs[0]
    return 1


_STEPS: tuple[Callable[[Any], int], ...] = (
    widen_bfloat16,
    fuse_rotary,
    rotate_length_major,
    cancel_swaps,
    skip_views,
    pack_projections,
    ask_the_tokens,
    keep_rows,
    ask_the_tokens,
    shorten_views,
)
