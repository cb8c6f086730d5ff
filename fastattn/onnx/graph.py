"""Adding nodes while a translation is recorded: contrib operators, and operators that hold a subgraph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import evaluator
from onnxscript import opset20 as op

__all__ = [
    "CONTRIB_DOMAIN",
    "FUSED_DTYPES",
    "Subgraph",
    "arguments_by_name",
    "cast",
    "computing_dtype",
    "emit",
    "number",
    "vector",
]

# ONNX Runtime's own operators.
CONTRIB_DOMAIN = "com.microsoft"

# What those that replace several standard ones take.
FUSED_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def arguments_by_name(operator: Any, arguments: Sequence[Any]) -> dict[str, Any]:
    """The arguments of a call of a registered operator under their names in its schema."""
    names = [argument.name for argument in operator._schema.arguments]
    return dict(zip(names, arguments, strict=True))


def computing_dtype(dtype: Any) -> Any:
    """What the operations compute in, given the dtype of their tensors."""
    return ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def cast(x: Any, given: Any, wanted: Any) -> Any:
    """`x` of the dtype `given` in the dtype `wanted`; no node where they are the same."""
    return x if given == wanted else op.Cast(x, to=wanted)


def emit(op_type: str, inputs: Sequence[Any], domain: str = "", **attributes: Any) -> Any:
    """Record a node that onnxscript's functions cannot: contrib, with a subgraph, or with outputs left out.

    Trailing absent inputs are dropped. Returns the node's only output.
    """
    present = list(inputs)
    while present and present[-1] is None:
        present.pop()
    node = ir.node(op_type, present, attributes=attributes or None, domain=domain)
    # While torch.onnx translates, the default evaluator is its recorder.
    evaluator.default().nodes.append(node)
    return node.outputs[0]


def number(value: float, dtype: Any) -> Any:
    """A constant scalar of just this dtype: the recorder would make a float32 of a Python number."""
    return op.Constant(value=ir.tensor(value, dtype=dtype))


def vector(*elements: int) -> Any:
    """A constant int64 vector, for where the recorder cannot tell the dtype of a Python list."""
    return op.Constant(value_ints=list(elements))


class Subgraph:
    """The body of a control-flow node under construction; it may use any value of the graph around it."""

    def __init__(self, name: str, inputs: Sequence[Any] = ()) -> None:
        self._name = name
        self._inputs = inputs
        self._nodes: list[Any] = []

    def add(self, op_type: str, inputs: Sequence[Any], domain: str = "", **attributes: Any) -> Any:
        """Append a node and return its only output."""
        node = ir.node(op_type, inputs, attributes=attributes or None, domain=domain)
        self._nodes.append(node)
        return node.outputs[0]

    def record(self, emitting: Callable[[], Any]) -> Any:
        """Append what `emitting` emits by the functions of an operator set, and return what it returns.

        Constants stay in the graph around: the recorder keeps one of a kind, and others may use it.
        """
        nodes = evaluator.default().nodes
        before = len(nodes)
        result = emitting()
        emitted = nodes[before:]
        nodes[before:] = [node for node in emitted if node.op_type == "Constant"]
        self._nodes.extend(node for node in emitted if node.op_type != "Constant")
        return result

    def graph(self, outputs: Sequence[tuple[Any, Any]]) -> Any:
        """The finished graph; `outputs` are pairs of a value and its type."""
        for value, value_type in outputs:
            value.type = value_type
        return ir.Graph(self._inputs, [value for value, _ in outputs], nodes=self._nodes, name=self._name)
