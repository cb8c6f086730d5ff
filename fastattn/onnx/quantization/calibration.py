"""Activation ranges of a graph, measured by running it in ONNX Runtime on typical inputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["ChannelRange", "channel_ranges"]

Batch = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class ChannelRange:
    """The least and the greatest value of each of K channels, float32 [K], zero included."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


def channel_ranges(model: Any, values: Sequence[Any], batches: Iterable[Batch]) -> list[ChannelRange]:
    """Run the float32 graph on `batches`; the ranges of `values` [..., K], which lie in the main graph.

    The ranges are reduced in the graph, so that activations of large models are never held.

    Raises:
        ValueError: there is no batch, or one does not fit the graph's inputs (names, types, dimensions).
    """
    import onnxruntime

    wanted = {value.name: value for value in model.graph.inputs if not value.is_initializer()}
    lows: list[NDArray[np.float32]] | None = None
    highs: list[NDArray[np.float32]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibrated.onnx"
        with _ranges_as_outputs(model, values) as names:
            ir.save(model, path, external_data="calibrated.data")
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        for number, batch in enumerate(batches):
            _check(number, batch, wanted)
            found = session.run(names, dict(batch))
            low, high = found[0::2], found[1::2]
            if lows is None:
                lows, highs = [np.zeros_like(x) for x in low], [np.zeros_like(x) for x in high]
            for kept, new in zip(lows, low, strict=True):
                np.fmin(kept, new, out=kept, where=np.isfinite(new))
            for kept, new in zip(highs, high, strict=True):
                np.fmax(kept, new, out=kept, where=np.isfinite(new))
        del session
    if lows is None:
        raise ValueError("calibration has no batches; give at least one dict of the graph's inputs")
    return [ChannelRange(low, high) for low, high in zip(lows, highs, strict=True)]


def _check(number: int, batch: Batch, wanted: Mapping[str, Any]) -> None:
    if set(batch) != set(wanted):
        raise ValueError(
            f"calibration batch {number} has {sorted(batch)}; the graph's inputs are {sorted(wanted)}"
        )
    for name, value in wanted.items():
        array = np.asarray(batch[name])
        expected = value.dtype.numpy()
        fixed = [size if isinstance(size, int) else None for size in value.shape]
        fits = len(fixed) == array.ndim and all(
            size in (None, real) for size, real in zip(fixed, array.shape, strict=False)
        )
        if array.dtype != expected or not fits:
            raise ValueError(
                f"calibration batch {number} has {name} as {array.dtype} {list(array.shape)}; "
                f"the graph takes {expected} {list(value.shape)}"
            )


@contextmanager
def _ranges_as_outputs(model: Any, values: Sequence[Any]) -> Iterator[list[str]]:
    """The graph with two more outputs a value, its least and greatest a channel; afterwards as before."""
    graph = model.graph
    outputs = len(graph.outputs)
    nodes: list[Any] = []
    try:
        axes = ir.node("Constant", [], {"value_ints": [0]})
        nodes.append(axes)
        for index, value in enumerate(values):
            flat = ir.node("Flatten", [value], {"axis": -1})
            nodes.append(flat)
            for kind in ("ReduceMin", "ReduceMax"):
                reduced = ir.node(kind, [flat.outputs[0], axes.outputs[0]], {"keepdims": 0})
                reduced.outputs[0].name = f"calibrated_{kind}_{index}"
                reduced.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
                nodes.append(reduced)
                graph.outputs.append(reduced.outputs[0])
        for node in nodes:
            if node.outputs[0].name is None:
                node.outputs[0].name = f"calibrating_{id(node)}"
        graph.extend(nodes)
        yield [value.name for value in graph.outputs[outputs:]]
    finally:
        del graph.outputs[outputs:]
        for node in reversed(nodes):
            if node.graph is graph:
                graph.remove(node, safe=True)
