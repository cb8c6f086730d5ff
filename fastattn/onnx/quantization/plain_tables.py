"""Quantized embedding tables without GatherBlockQuantized, for runtimes that have no kernel of it.

onnxruntime-web's build with WebGPU, which transformers.js always loads, has none for the CPU (1.26 to 1.31).
What stands in its place reads the same data and scales: rows are gathered as they are stored, then scaled.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from fastattn.onnx.quantization.editing import Editor

__all__ = ["without_block_gathers"]


def without_block_gathers(model: Any) -> int:
    """Replace every GatherBlockQuantized of `model`, in place; returns how many there were."""
    nodes = [
        node
        for node in ir.traversal.RecursiveGraphIterator(model.graph)
        if node.op_type == "GatherBlockQuantized"
    ]
    editor = Editor(model, contrib=False)
    for node in nodes:
        editor.replace(node, _rows(editor, node))
    return len(nodes)


def _rows(editor: Editor, node: Any) -> Any:
    """The node's result, [*indices, width], from operators of ai.onnx."""
    data, indices, scales = node.inputs[:3]
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    bits, size = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    count = int(scales.shape[1])
    # A single block may be longer than a row.
    width = count * size if data.const_value is None else int(data.shape[1]) * 8 // bits
    block = width // count
    flat = editor.before(node, "Reshape", [indices, editor.vector(-1)])[0]
    blocks = [-1, count, block]
    levels = _levels(editor, node, editor.before(node, "Gather", [data, flat], axis=0)[0], bits, blocks)
    if zero_points is None:
        zero = editor.constant("middle_level", np.array(2.0 ** (bits - 1), np.float32))
    else:
        packed = editor.before(node, "Gather", [zero_points, flat], axis=0)[0]
        stored = int(zero_points.shape[1]) * 8 // bits
        zero = _levels(editor, node, packed, bits, [-1, stored, 1])
        if stored > count:
            zero = editor.before(node, "Slice", [zero, *(editor.vector(x) for x in (0, count, 1))])[0]
    scale = editor.before(node, "Gather", [scales, flat], axis=0)[0]
    scale = editor.before(node, "Reshape", [scale, editor.vector(-1, count, 1)])[0]
    centred = editor.before(node, "Sub", [levels, zero])[0]
    scaled = editor.before(node, "Mul", [centred, scale])[0]
    leading = editor.before(node, "Shape", [indices])[0]
    shape = editor.before(node, "Concat", [leading, editor.vector(width)], axis=0)[0]
    return editor.before(node, "Reshape", [scaled, shape])[0]


def _levels(editor: Editor, node: Any, packed: Any, bits: int, shape: list[int]) -> Any:
    """uint8 [rows, bytes], of 4 bits two a byte with the lower one first, as float32 of a shape."""
    levels = editor.before(node, "Cast", [packed], to=ir.DataType.FLOAT.value)[0]
    if bits == 4:
        sixteen = editor.constant("levels_of_4_bits", np.array(16.0, np.float32))
        quotient = editor.before(node, "Div", [levels, sixteen])[0]
        high = editor.before(node, "Floor", [quotient])[0]
        above = editor.before(node, "Mul", [high, sixteen])[0]
        low = editor.before(node, "Sub", [levels, above])[0]
        pair = [editor.before(node, "Unsqueeze", [each, editor.vector(-1)])[0] for each in (low, high)]
        levels = editor.before(node, "Concat", pair, axis=-1)[0]
    return editor.before(node, "Reshape", [levels, editor.vector(*shape)])[0]
