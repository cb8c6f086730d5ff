"""Putting quantized operators in the place of a node: constants and nodes in, the old node out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from fastattn.onnx.graph import CONTRIB_DOMAIN

__all__ = ["Editor"]


class Editor:
    """Adds constants to a model's main graph and nodes in front of others, wherever those are."""

    def __init__(self, model: Any, contrib: bool = True) -> None:
        self._graph = model.graph
        self._names = {value.name for value in model.graph.initializers.values()}
        self._vectors: dict[tuple[int, ...], Any] = {}
        self._added = 0
        if contrib:
            model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)

    def constant(self, name: str, array: NDArray[Any]) -> Any:
        """A new initializer; subgraphs may use it too."""
        while name in self._names:
            name += "_"
        self._names.add(name)
        tensor: Any = ir.tensor(np.asarray(array, order="C"), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def vector(self, *elements: int) -> Any:
        """A constant int64 vector; equal ones are stored once."""
        found = self._vectors.get(elements)
        if found is None:
            found = self._vectors[elements] = self.constant(
                "indices_" + "_".join(map(str, elements)), np.array(elements, np.int64)
            )
        return found

    def before(
        self,
        node: Any,
        op_type: str,
        inputs: Sequence[Any],
        domain: str = "",
        outputs: int = 1,
        **attributes: Any,
    ) -> list[Any]:
        """A new node in front of `node`, in its graph; returns its outputs."""
        present = list(inputs)
        while present and present[-1] is None:
            present.pop()
        made = ir.node(op_type, present, attributes or None, domain=domain, num_outputs=outputs)
        for output in made.outputs:
            self._added += 1
            output.name = f"{node.outputs[0].name}_quantized_{self._added}"
        node.graph.insert_before(node, made)
        return list(made.outputs)

    def row(self, node: Any, bias: Any | None) -> Any | None:
        """A bias [N] or [1, N] in front of `node` as the [N] that the quantized operators take."""
        if bias is None or len(bias.shape) == 1:
            return bias
        return self.before(node, "Reshape", [bias, self.vector(-1)])[0]

    def replace(self, node: Any, value: Any) -> None:
        """Let everything that used the only output of `node` use `value`, and take `node` out."""
        old = node.outputs[0]
        name = old.name
        value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        node.graph.remove(node, safe=True)
        value.name = name
