"""Rotary embedding written out in a graph, as the target's RotaryEmbedding that looks angles up by position.

transformers' layers multiply and add themselves; `sources.rotary_tables` has made their angles rows of two
tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fastattn.onnx.graph import CONTRIB_DOMAIN
from fastattn.onnx.rewriting import int_vector, redirect
from fastattn.onnx.targets import current_target

__all__ = ["fuse_rotary", "rotate_length_major", "written_out"]


@dataclass(frozen=True)
class _Angles:
    """cos or sin of every token: rows of a table [positions, R / 2], each twice or once."""

    table: Any
    positions: Any
    twice: bool


def fuse_rotary(model: Any) -> int:
    """x * cos + rotate_half(x) * sin, and the same by halves, of x [B, H, S, R] or the first R of a head."""
    count = 0
    for node in list(model.graph):
        # One that joined the halves of a head is gone by now.
        found = None if node.graph is None else _by_rotated(node) or _by_halves(node)
        if found is None:
            continue
        x, cos, sin = found
        width = 2 * cos.table.shape[1]
        if x.shape is None or x.shape[-1] != width or sin.table.shape[1] * 2 != width:
            continue
        if cos.positions is not sin.positions:
            continue
        whole, out = _whole_head(x, node, width)
        contrib = current_target().contrib
        rotated = ir.node(
            "RotaryEmbedding",
            [whole, cos.positions, cos.table, sin.table]
            if contrib
            else [whole, cos.table, sin.table, cos.positions],
            domain=CONTRIB_DOMAIN if contrib else "",
            attributes={
                "interleaved": 0,
                "num_heads": int(whole.shape[1]),
                "rotary_embedding_dim": width if whole is not x else 0,
            },
        )
        model.graph.insert_before(out, rotated)
        redirect(out, rotated.outputs[0])
        count += 1
    return count


def written_out(model: Any) -> int:
    """How many products with angles are left."""
    return sum(_scaled(node.outputs[0]) is not None for node in model.graph if node.op_type == "Mul")


def rotate_length_major(model: Any) -> int:
    """Rotate [B, S, H * D] as the product made it, not [B, H, S, D]: no transposition before or after."""
    count = 0
    for node in list(model.graph):
        if node.op_type != "RotaryEmbedding":
            continue
        x, out = node.inputs[0], node.outputs[0]
        transposed = x.producer()
        if (
            transposed is None
            or transposed.op_type != "Transpose"
            or out.shape is None
            or len(out.shape) != 4
        ):
            continue
        if list(transposed.attributes["perm"].as_ints()) != [0, 2, 1, 3]:
            continue
        batch, heads, length, width = out.shape
        flat = ir.node("Reshape", [transposed.inputs[0], int_vector(model, 0, 0, heads * width)])
        rotated = ir.node(
            "RotaryEmbedding",
            [flat.outputs[0], *node.inputs[1:]],
            domain=node.domain,
            attributes=dict(node.attributes),
        )
        for each in (flat, rotated):
            each.outputs[0].shape, each.outputs[0].type = ir.Shape([batch, length, heads * width]), out.type
        split = ir.node("Reshape", [rotated.outputs[0], int_vector(model, 0, 0, heads, width)])
        split.outputs[0].shape, split.outputs[0].type = ir.Shape([batch, length, heads, width]), out.type
        back = ir.node("Transpose", [split.outputs[0]], attributes={"perm": [0, 2, 1, 3]})
        model.graph.insert_before(node, [flat, rotated, split, back])
        redirect(node, back.outputs[0])
        count += 1
    return count


def _by_rotated(node: Any) -> tuple[Any, _Angles, _Angles] | None:
    """x, cos and sin of Add(x * cos, rotate_half(x) * sin)."""
    if node.op_type != "Add":
        return None
    for first, second in (node.inputs, reversed(node.inputs)):
        straight, turned = _scaled(first), _scaled(second)
        if straight is None or turned is None or not straight[1].twice or not turned[1].twice:
            continue
        joined = turned[0].producer()
        if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
            continue
        negated = joined.inputs[0].producer()
        if negated is None or negated.op_type != "Neg":
            continue
        upper, lower = _part(negated.inputs[0]), _part(joined.inputs[1])
        half = straight[1].table.shape[1]
        if upper is None or lower is None or upper[0] is not straight[0] or lower[0] is not straight[0]:
            continue
        if upper[1:] == (half, 2 * half) and lower[1:] == (0, half):
            return straight[0], straight[1], turned[1]
    return None


def _by_halves(node: Any) -> tuple[Any, _Angles, _Angles] | None:
    """x, cos and sin of Concat(a * cos - b * sin, b * cos + a * sin), a and b the halves of x."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return None
    difference, total = (value.producer() for value in node.inputs)
    if difference is None or total is None or (difference.op_type, total.op_type) != ("Sub", "Add"):
        return None
    terms = [_scaled(value) for value in (*difference.inputs, *total.inputs)]
    if any(term is None or term[1].twice for term in terms):
        return None
    (a, cos), (b, sin), (b_again, cos_again), (a_again, sin_again) = (
        term for term in terms if term is not None
    )
    if a is not a_again or b is not b_again or cos != cos_again or sin != sin_again:
        return None
    lower, upper = _part(a), _part(b)
    half = cos.table.shape[1]
    if lower is None or upper is None or lower[0] is not upper[0]:
        return None
    return (lower[0], cos, sin) if (lower[1:], upper[1:]) == ((0, half), (half, 2 * half)) else None


def _scaled(value: Any) -> tuple[Any, _Angles] | None:
    """x and the angles of x * angles."""
    node = value.producer()
    if node is None or node.op_type != "Mul":
        return None
    for x, factor in (node.inputs, reversed(node.inputs)):
        angles = _angles(factor)
        if angles is not None:
            return x, angles
    return None


def _angles(value: Any) -> _Angles | None:
    node = value.producer()
    while node is not None and node.op_type == "Unsqueeze":
        node = node.inputs[0].producer()
    twice = node is not None and node.op_type == "Concat" and len(node.inputs) == 2
    if node is not None and twice:
        if node.inputs[0] is not node.inputs[1]:
            return None
        node = node.inputs[0].producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table, positions = node.inputs
    return (
        _Angles(table, positions, twice) if table.const_value is not None and len(table.shape) == 2 else None
    )


def _part(value: Any) -> tuple[Any, int, int] | None:
    """What a value is a part of, and from where to where of its last dimension."""
    node = value.producer()
    if node is None or node.inputs[0].shape is None:
        return None
    whole = node.inputs[0]
    rank, width = len(whole.shape), whole.shape[-1]
    if node.op_type == "Slice":
        start, end, axis = (_number(each) for each in node.inputs[1:4])
        step = 1 if len(node.inputs) < 5 else _number(node.inputs[4])
        if axis not in (-1, rank - 1) or step != 1 or start is None or end is None or start < 0 or end < 0:
            return None
        return whole, start, min(end, width)
    if node.op_type == "Split" and node.attributes.get_int("axis", 0) in (-1, rank - 1):
        sizes = [output.shape[-1] for output in node.outputs]
        index = list(node.outputs).index(value)
        return whole, sum(sizes[:index]), sum(sizes[: index + 1])
    return None


def _number(value: Any) -> int | None:
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size != 1 else int(tensor.numpy().reshape(-1)[0])


def _whole_head(x: Any, node: Any, width: int) -> tuple[Any, Any]:
    """The head that x is the first part of, and the node that joins the rotated part with the rest; x and
    `node` where all of the head is rotated.
    """
    uses = node.outputs[0].uses()
    joined = next(iter(uses)).node if len(uses) == 1 else None
    if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
        return x, node
    first, rest = _part(x), _part(joined.inputs[1])
    if first is None or rest is None or joined.inputs[0] is not node.outputs[0] or first[0] is not rest[0]:
        return x, node
    if first[1:] == (0, width) and rest[1:] == (width, first[0].shape[-1]):
        return first[0], joined
    return x, node
