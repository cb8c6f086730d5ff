"""Putting nodes in the place of others in a finished graph."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

__all__ = ["int_vector", "redirect"]


def int_vector(model: ir.Model, *elements: int) -> Any:
    """A constant int64 vector of the graph, one for all that ask for the same."""
    name = "vector." + ".".join(map(str, elements))
    value = model.graph.initializers.get(name)
    if value is None:
        tensor = ir.tensor(elements, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([len(elements)]),
        )
        model.graph.register_initializer(value)
    return value


def redirect(node: Any, value: Any) -> None:
    """Let everything that used the output of `node` use `value`, and take `node` out."""
    old = node.outputs[0]
    value.shape, value.type, value.name = old.shape, old.type, old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    node.graph.remove(node, safe=True)
