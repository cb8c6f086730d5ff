"""A float32 graph in float16: weights, computation and caches, while other inputs and outputs stay float32.

What is computed from integers alone (positions and the angles of rotary embeddings made of them, buckets of
relative positions, additive masks) stays float32 up to where it meets an activation: positions above 2048
have no float16 of their own, and neither has the lowest float32 that masks are filled with.

ONNX Runtime's own converter is for models in one protobuf below 2 GB, and halves that arithmetic too.
"""

from __future__ import annotations

from collections import Counter
from enum import Enum
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["to_half"]

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Caches go around from outputs to inputs, in one buffer where the operator shares it: a Cast would copy them.
_CACHES = ("past_key_values.", "present.")

_LARGEST = float(np.finfo(np.float16).max)

# A product with a smaller constant is arithmetic on positions (rotary frequencies), not a layer.
_SMALLEST_WEIGHT = 1 << 10

# Operators whose outputs are integers or truth values whatever their inputs are.
_NO_FLOATS = frozenset(
    {
        *("Shape", "Size", "NonZero", "ArgMax", "ArgMin", "IsNaN", "IsInf", "SequenceLength"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Not", "Xor"),
    }
)
# Inputs that stay float32 whatever the others are.
_FLOAT_INPUTS = {"Resize": (1, 2)}


class _Kind(Enum):
    """Of a value: not float32; a constant, which becomes what its users are; integers' float32; float16."""

    OTHER = 0
    CONSTANT = 1
    EXACT = 2
    HALF = 3


def to_half(model: Any) -> list[dict[str, Any]]:
    """Rewrite `model` in place; returns the decisions.

    Weights are converted one by one as the model is saved: none is held twice.

    Raises:
        ValueError: the graph has no float32 weight.
    """
    converter = _Converter(model)
    if not any(_is_float(value) for value in model.graph.initializers.values()):
        raise ValueError(f"'fp16': the graph {model.graph.name!r} has no float32 weight")
    for value in list(model.graph.inputs):
        if _is_float(value) and not value.is_initializer():
            if value.name.startswith(_CACHES):
                converter.make_half(value)
            else:
                converter.narrow_input(value)
    converter.graph(model.graph)
    for index, value in enumerate(list(model.graph.outputs)):
        if converter.kind(value) is _Kind.HALF and not value.name.startswith(_CACHES):
            converter.widen_output(model.graph, index, value)
    return converter.decisions()


def _is_float(value: Any) -> bool:
    return value is not None and value.dtype == _FLOAT


class _Converter:
    def __init__(self, model: Any) -> None:
        self._main = model.graph
        self._kinds: dict[Any, _Kind] = {}
        self._constants: dict[Any, Any] = {}
        self._narrowed: dict[tuple[Any, Any], Any] = {}
        self._counts: Counter[str] = Counter()

    def kind(self, value: Any | None) -> _Kind:
        if value is None:
            return _Kind.OTHER
        if value.is_initializer():
            return _Kind.CONSTANT if _is_float(value) else _Kind.OTHER
        return self._kinds.get(value, _Kind.OTHER)

    def decisions(self) -> list[dict[str, Any]]:
        count = self._counts
        done = [
            {
                "what": "weights",
                "count": count["weights"],
                "how": "float16",
                "why": "half the memory to read",
            },
            {"what": "operators", "count": count["half"], "how": "float16", "why": "tensor cores"},
        ]
        if count["exact"]:
            why = "computed from integers alone: positions and masks have no exact float16"
            done.append({"what": "operators", "count": count["exact"], "how": "left in float32", "why": why})
        if count["clipped"]:
            why = "elements beyond float16's range, -65504 to 65504"
            done.append({"what": "constants", "count": count["clipped"], "how": "clipped", "why": why})
        return done

    def narrow_input(self, value: Any) -> None:
        """A float32 input of the model: float16 behind a Cast."""
        users = list(value.uses())
        cast = ir.node("Cast", [value], {"to": _HALF})
        made = cast.outputs[0]
        made.name, made.shape, made.type = f"{value.name}_half", value.shape, ir.TensorType(_HALF)
        for use in users:
            use.node.replace_input_with(use.idx, cast.outputs[0])
        self.make_half(cast.outputs[0])
        first = next(iter(self._main), None)
        assert first is not None
        self._main.insert_before(first, cast)

    def widen_output(self, graph: Any, index: int, value: Any) -> None:
        """A float16 output of the model: float32 under its name, behind a Cast."""
        cast = ir.node("Cast", [value], {"to": _FLOAT})
        output = cast.outputs[0]
        output.name, output.shape, output.type = value.name, value.shape, ir.TensorType(_FLOAT)
        value.name = f"{value.name}_half"
        graph.append(cast)
        graph.outputs[index] = output

    def graph(self, graph: Any) -> None:
        """Convert every node of a graph; a subgraph where the node that holds it is."""
        for node in list(graph):
            subgraphs = [a.as_graph() for a in node.attributes.values() if a.type == ir.AttributeType.GRAPH]
            if subgraphs:
                self._control_flow(node, subgraphs)
            elif node.op_type in _NO_FLOATS:
                self._inputs_alike(node)
            else:
                self._operator(node)

    def _operator(self, node: Any) -> None:
        kinds = [self.kind(value) for value in node.inputs]
        # What a loop collects in a sequence is activations.
        exact = not (_Kind.HALF in kinds or _reads_weights(node, kinds) or "Sequence" in node.op_type)
        if node.op_type == "Cast":
            self._cast(node, kinds[0])
            return
        if node.op_type in ("Constant", "ConstantOfShape"):
            tensor = node.attributes.get("value")
            floats = tensor is None or tensor.as_tensor().dtype == _FLOAT
            if floats and (tensor is not None or node.op_type == "ConstantOfShape"):
                array = np.zeros(1, np.float32) if tensor is None else tensor.as_tensor().numpy()
                node.attributes["value"] = ir.AttrTensor("value", ir.tensor(self._clipped(array)))
                self._made(node, _Kind.HALF)
            return
        if all(kind is _Kind.OTHER for kind in kinds):
            return
        if not exact:
            self._narrow(node, skipping=_FLOAT_INPUTS.get(node.op_type, ()))
        self._made(node, _Kind.EXACT if exact else _Kind.HALF)

    def _cast(self, node: Any, given: _Kind) -> None:
        """To float32: exact from integers and what was made of them; of activations, to float16 instead."""
        if node.attributes.get_int("to") != _FLOAT:
            return
        if given is not _Kind.HALF:
            self._made(node, _Kind.EXACT)
        else:
            node.attributes["to"] = ir.AttrInt64("to", _HALF)
            self._narrow(node)
            self._made(node, _Kind.HALF)

    def _inputs_alike(self, node: Any) -> None:
        """A comparison takes two of one type."""
        if any(self.kind(value) is _Kind.HALF for value in node.inputs):
            self._narrow(node)

    def _control_flow(self, node: Any, subgraphs: list[Any]) -> None:
        """What goes around a loop and what leaves a branch is float16."""
        self._narrow(node)
        for subgraph in subgraphs:
            for value in subgraph.inputs:
                if _holds_floats(value.type):
                    self.make_half(value)
            self.graph(subgraph)
            for index, value in enumerate(subgraph.outputs):
                if self.kind(value) in (_Kind.EXACT, _Kind.CONSTANT):
                    subgraph.outputs[index] = self._cast_behind(subgraph, value)
        outputs = [subgraph.outputs for subgraph in subgraphs]
        skipped = len(outputs[0]) - len(node.outputs)  # a loop's condition, which it does not return
        for index, value in enumerate(node.outputs):
            if any(self.kind(each[index + skipped]) is _Kind.HALF for each in outputs):
                self.make_half(value)

    def _made(self, node: Any, kind: _Kind) -> None:
        self._counts["half" if kind is _Kind.HALF else "exact"] += 1
        for value in node.outputs:
            if value.type is not None and not _holds_floats(value.type):
                continue
            if kind is _Kind.HALF:
                self.make_half(value)
            else:
                self._kinds[value] = kind

    def make_half(self, value: Any) -> None:
        """Note a value's float16, in its type too where it has one."""
        self._kinds[value] = _Kind.HALF
        if value.type is not None:
            value.type = _half_type(value.type)

    def _narrow(self, node: Any, skipping: tuple[int, ...] = ()) -> None:
        for index, value in enumerate(node.inputs):
            kind = self.kind(value)
            if index in skipping:
                continue
            if kind is _Kind.CONSTANT:
                node.replace_input_with(index, self._half_constant(value))
            elif kind is _Kind.EXACT:
                node.replace_input_with(index, self._half_of(node, value))

    def _half_constant(self, value: Any) -> Any:
        """The float16 form of an initializer, converted when it is first read."""
        found = self._constants.get(value)
        if found is None:
            tensor, name = value.const_value, f"{value.name}_half"
            if bool((np.abs(tensor.numpy()) > _LARGEST).any()):
                self._counts["clipped"] += 1
            lazy = ir.LazyTensor(
                lambda: ir.tensor(_to_half(tensor.numpy()), name=name),
                dtype=_HALF,
                shape=tensor.shape,
                name=name,
            )
            found = ir.Value(name=name, shape=lazy.shape, type=ir.TensorType(_HALF), const_value=lazy)
            self._main.register_initializer(found)
            self._constants[value] = found
            self._kinds[found] = _Kind.HALF
            self._counts["weights"] += 1
        return found

    def _half_of(self, node: Any, value: Any) -> Any:
        """An exact value in float16 in front of `node`, saturating."""
        key = (node.graph, value)
        found = self._narrowed.get(key)
        if found is None:
            nodes = _saturated(value, self._main)
            for each in nodes:
                node.graph.insert_before(node, each)
            found = self._narrowed[key] = nodes[-1].outputs[0]
            self._kinds[found] = _Kind.HALF
        return found

    def _cast_behind(self, graph: Any, value: Any) -> Any:
        if value.is_initializer():
            return self._half_constant(value)
        nodes = _saturated(value, self._main)
        graph.extend(nodes)
        self._kinds[nodes[-1].outputs[0]] = _Kind.HALF
        return nodes[-1].outputs[0]

    def _clipped(self, array: NDArray[Any]) -> NDArray[np.float16]:
        self._counts["clipped"] += bool((np.abs(array) > _LARGEST).any())
        return _to_half(array)


def _to_half(array: NDArray[Any]) -> NDArray[np.float16]:
    # Infinities stay: they mean it.
    finite = np.where(np.isinf(array), array, np.clip(array, -_LARGEST, _LARGEST))
    return finite.astype(np.float16)


def _reads_weights(node: Any, kinds: list[_Kind]) -> bool:
    """Whether a node takes rows of a table, or multiplies by a weight: activations begin there."""
    if node.op_type == "Gather":
        return kinds[0] is _Kind.CONSTANT and len(node.inputs[0].shape) > 1
    if node.op_type in ("MatMul", "Gemm", "Conv"):
        weights = [value for value, kind in zip(node.inputs, kinds, strict=True) if kind is _Kind.CONSTANT]
        return any(int(np.prod(tuple(value.shape))) >= _SMALLEST_WEIGHT for value in weights)
    return False


def _saturated(value: Any, graph: Any) -> list[Any]:
    """Nodes that make float16 of a float32 value; beyond its range, of the nearest number it has."""
    bounds = []
    for name, bound in (("half_lowest", -_LARGEST), ("half_largest", _LARGEST)):
        if name not in graph.initializers:
            tensor: Any = ir.tensor(np.array(bound, np.float32), name=name)
            graph.register_initializer(
                ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(_FLOAT), const_value=tensor)
            )
        bounds.append(graph.initializers[name])
    clip = ir.node("Clip", [value, *bounds])
    cast = ir.node("Cast", [clip.outputs[0]], {"to": _HALF})
    for node, ending, dtype in ((clip, "saturated", _FLOAT), (cast, "half", _HALF)):
        output = node.outputs[0]
        output.name, output.shape, output.type = f"{value.name}_{ending}", value.shape, ir.TensorType(dtype)
    return [clip, cast]


def _holds_floats(value_type: Any) -> bool:
    if isinstance(value_type, ir.SequenceType | ir.OptionalType):
        return _holds_floats(value_type.elem_type)
    return value_type is not None and value_type.dtype == _FLOAT


def _half_type(value_type: Any) -> Any:
    if isinstance(value_type, ir.SequenceType | ir.OptionalType):
        return type(value_type)(_half_type(value_type.elem_type))
    return ir.TensorType(_HALF) if value_type.dtype == _FLOAT else value_type
