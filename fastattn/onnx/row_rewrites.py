"""A decoder's hidden states stay rows, [tokens, N], from one matrix product to the next.

Every product is a Gemm over rows, and around each the model's own shape, [batch, sequence, N], costs a
Reshape before, a Reshape after and the two nodes that compute its shape. Additions, norms and activations
need none of that: they are the same on rows. A step of decoding is short enough for every node to show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

__all__ = ["compute_in_rows"]

# Operators that compute each row by itself, given rows or what is the same for all rows.
_ROWWISE = frozenset(
    (
        *("Add", "Sum", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal", "Relu", "Sigmoid", "Tanh", "Erf"),
        *(
            "Gelu",
            "FastGelu",
            "QuickGelu",
            "LayerNormalization",
            "SimplifiedLayerNormalization",
            "ReduceMean",
        ),
    )
)
_LAST_AXIS = ("LayerNormalization", "SimplifiedLayerNormalization")

# Batch and sequence, as the traced model names their sizes.
Leading = tuple[str, str]


def compute_in_rows(model: Any) -> int:
    """Let what lies between two products compute on rows, in place; how many nodes now do."""
    for node in list(model.graph):
        if node.op_type in ("Transpose", "Reshape"):
            _cancel(node)
    found = _Rows(model.graph)
    for node in list(model.graph):
        found.visit(node)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.NameFixPass()(model)
    return found.count


def _cancel(node: Any) -> None:
    """Take out a transposition that another undoes, and heads that are split and joined again."""
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    if before is None or before.op_type != node.op_type:
        return
    original = before.inputs[0]
    if node.op_type == "Transpose":
        first, second = (each.attributes["perm"].as_ints() for each in (before, node))
        undone = [first[axis] for axis in second] == list(range(len(first)))
    else:
        undone = _constant(node.inputs[1]) is not None and _splits_heads(original, before.outputs[0], node)
    if undone:
        _redirect(node, original)


def _splits_heads(original: Any, split: Any, node: Any) -> bool:
    """[B, S, N] to [B, S, H, D], then to [0, 0, N]."""
    first, second, wanted = original.shape, split.shape, _constant(node.inputs[1])
    if first is None or second is None or (len(first), len(second)) != (3, 4):
        return False
    width = first[2]
    return (
        isinstance(width, int)
        and wanted == [0, 0, width]
        and _leading(original) is not None
        and [str(size) for size in first[:2]] == [str(size) for size in second[:2]]
    )


@dataclass
class _Rows:
    """What is known while a graph's nodes are visited in order.

    Attributes:
        graph: being rewritten.
        rows: for a value [B, S, N] its rows [B * S, N].
        flat: values that have two dimensions.
        leading: batch and sequence of a value whose shape the trace did not say.
        shapes: for every pair of batch and sequence, the value int64 [2] that holds them.
        count: nodes that now compute on rows.
    """

    graph: Any
    rows: dict[Any, Any] = field(default_factory=dict)
    flat: set[Any] = field(default_factory=set)
    leading: dict[Any, Leading] = field(default_factory=dict)
    shapes: dict[Leading, Any] = field(default_factory=dict)
    count: int = 0

    def visit(self, node: Any) -> None:
        if node.op_type == "Gemm":
            self.flat.add(node.outputs[0])
        elif node.op_type == "Reshape":
            self._reshape(node)
        elif node.op_type in _ROWWISE and node.domain in ("", "com.microsoft"):
            self._compute(node)

    def _reshape(self, node: Any) -> None:
        source, result = node.inputs[0], node.outputs[0]
        wanted = _constant(node.inputs[1])
        if wanted is not None:
            if len(wanted) != 2 or wanted[0] != -1:
                return
            source = _before_views(source, self.rows)
            node.replace_input_with(0, source)
            if source in self.rows:
                _redirect(node, self.rows[source])
            elif self._known(source) is not None and source.shape[2] == wanted[1]:
                self._hold(source)
                self.rows[source] = result
                self.flat.add(result)
            else:
                self.flat.add(result)
            return
        if source not in self.flat:
            return
        leading = self._known(result) or self._of_shape(node.inputs[1])
        if leading is None:
            return
        self.rows[result], self.leading[result] = source, leading
        if leading in self.shapes:
            # One computed shape serves all.
            wanted = self._shape(leading)
            self.graph.insert_before(node, wanted)
            node.replace_input_with(1, wanted.outputs[0])

    def _shape(self, leading: Leading) -> Any:
        """A node that computes the shape [batch, sequence, -1]."""
        inputs = [self.shapes[leading], self._initializer("minus_one", -1)]
        return ir.Node("", "Concat", inputs, [ir.AttrInt64("axis", 0)])

    def _compute(self, node: Any) -> None:
        found = {self.leading.get(x) or self._known(x) for x in node.inputs if x in self.rows}
        if len(found) != 1 or not _is_rowwise(node):
            return
        (leading,) = found
        if leading not in self.shapes:
            return
        others = [x for x in node.inputs if x is not None and x not in self.rows]
        if not all(_is_the_same_for_all(x) or self._known(x) == leading for x in others):
            return
        inputs = []
        for x in node.inputs:
            if x is not None and x not in self.rows and not _is_the_same_for_all(x):
                self._flatten(x, node)
            inputs.append(self.rows.get(x, x))
        attributes = {name: each for name, each in node.attributes.items() if name != "axis"}
        if node.op_type in _LAST_AXIS:
            attributes["axis"] = ir.AttrInt64("axis", -1)
        on_rows = ir.Node(node.domain, node.op_type, inputs, list(attributes.values()))
        # What cannot do with rows is given the model's own shape.
        wanted = self._shape(leading)
        shaped = ir.Node("", "Reshape", [on_rows.outputs[0], wanted.outputs[0]])
        self.graph.insert_before(node, [on_rows, wanted, shaped])
        on_rows.outputs[0].type = node.outputs[0].type
        _redirect(node, shaped.outputs[0])
        self.rows[shaped.outputs[0]], self.leading[shaped.outputs[0]] = on_rows.outputs[0], leading
        self.flat.add(on_rows.outputs[0])
        self.count += 1

    def _known(self, value: Any) -> Leading | None:
        return self.leading.get(value) or _leading(value)

    def _of_shape(self, shape: Any) -> Leading | None:
        """Batch and sequence of a shape that was joined from them and a width."""
        joined = shape.producer()
        if joined is None or joined.op_type != "Concat" or len(joined.inputs) != 2:
            return None
        sizes = joined.inputs[0].producer()
        if sizes is None or sizes.op_type != "Shape" or sizes.attributes.get_int("start", 0) != 0:
            return None
        if sizes.attributes.get_int("end", 3) not in (-1, 2):
            return None
        return self._known(sizes.inputs[0])

    def _hold(self, value: Any) -> None:
        """Keep batch and sequence of a value that is not computed on rows."""
        leading = self._known(value)
        if leading is None or leading in self.shapes:
            return
        node = ir.Node("", "Shape", [value], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 2)])
        maker = value.producer()
        if maker is None:
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.insert_after(maker, node)
        self.shapes[leading] = node.outputs[0]

    def _flatten(self, value: Any, before: Any) -> None:
        node = ir.Node("", "Reshape", [value, self._initializer("rows_of", -1, value.shape[2])])
        self.graph.insert_before(before, node)
        self.rows[value] = node.outputs[0]
        self.flat.add(node.outputs[0])

    def _initializer(self, prefix: str, *elements: int) -> Any:
        name = "_".join((prefix, *map(str, elements[1:])))
        known = self.graph.initializers.get(name)
        if known is not None:
            return known
        tensor = ir.tensor(list(elements), dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape([len(elements)]), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value


def _before_views(value: Any, rows: Any) -> Any:
    """What a value was before it was seen in other shapes, or the first of these whose rows are known."""
    while value not in rows and value.producer() is not None and value.producer().op_type == "Reshape":
        value = value.producer().inputs[0]
    return value


def _leading(value: Any) -> Leading | None:
    """Batch and sequence of a value [B, S, N] whose N is fixed."""
    shape = None if value is None else value.shape
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        return None
    names = [size if isinstance(size, int) else size.value for size in shape[:2]]
    return None if None in names else (str(names[0]), str(names[1]))


def _is_the_same_for_all(value: Any) -> bool:
    """A scalar, a vector as long as a row, or that with leading ones."""
    if value is None:
        return True
    shape = value.shape
    return value.is_initializer() and shape is not None and all(size == 1 for size in shape[:-1])


def _is_rowwise(node: Any) -> bool:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    if node.op_type in _LAST_AXIS:
        return node.attributes.get_int("axis", -1) in (-1, 2)
    if node.op_type == "ReduceMean":
        axes = _constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return axes == [-1] and node.attributes.get_int("keepdims", 1) == 1
    return True


def _constant(value: Any) -> list[int] | None:
    """The elements of a constant integer vector; None for anything else."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else [int(x) for x in tensor.numpy().reshape(-1)]


def _redirect(node: Any, value: Any) -> None:
    """Let everything that used the output of `node` use `value`, and take `node` out."""
    old = node.outputs[0]
    if value.shape is None:
        value.shape, value.type = old.shape, old.type
    if old.is_graph_output():
        value.name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
