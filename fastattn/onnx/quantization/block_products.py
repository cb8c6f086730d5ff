"""Weight-only products and embedding tables: MatMulNBits and GatherBlockQuantized, which may share their data."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from fastattn.onnx.graph import CONTRIB_DOMAIN
from fastattn.onnx.quantization.blocks import Blocks, quantize_blocks
from fastattn.onnx.quantization.editing import Editor
from fastattn.onnx.quantization.products import Product, Table

__all__ = ["BLOCK", "BlockWeights"]

# Elements of a row that share a scale. On VNNI 128 is the fastest of 16 to 256; 32 is a tenth slower, and
# four bits need it: the error of a weight is a quarter smaller.
BLOCK = {8: 128, 4: 32}

# The activations are rounded to 8 bits a block inside the operator, which is what makes it fast.
_INT8_ACTIVATIONS = 4


class BlockWeights:
    """Rewrites products and tables; each weight is quantized and stored once however many nodes use it."""

    def __init__(self, editor: Editor, bits: int) -> None:
        self._editor = editor
        self._bits = bits
        self._stored: dict[tuple[str, bool, float, int], tuple[Any, Any, Any, Blocks]] = {}

    def product(self, product: Product) -> None:
        """`product` as MatMulNBits, bias included."""
        data, scales, zero_points, blocks = self._weight(product.key, product, self._bits)
        editor, node = self._editor, product.node
        (result,) = editor.before(
            node,
            "MatMulNBits",
            [product.rows, data, scales, zero_points, None, editor.row(node, product.bias)],
            CONTRIB_DOMAIN,
            K=product.inputs,
            N=product.outputs,
            bits=blocks.bits,
            block_size=blocks.size,
            accuracy_level=_INT8_ACTIVATIONS,
        )
        editor.replace(node, result)

    def table(self, table: Table) -> str:
        """`table`'s Gather as GatherBlockQuantized; returns how it is stored.

        A table that no product shares has 8 bits in either case: it is read a row a token, so that fewer
        bits save no time.
        """
        key = (table.weight.name, True, 1.0)
        bits = self._bits if (*key, self._bits) in self._stored else 8
        data, scales, zero_points, blocks = self._weight(key, table, bits)
        editor, node = self._editor, table.node
        rows, count, stored_bytes = blocks.data.shape
        flat = editor.before(node, "Reshape", [data, editor.vector(rows, count * stored_bytes)])[0]
        (result,) = editor.before(
            node,
            "GatherBlockQuantized",
            [flat, node.inputs[1], scales, zero_points],
            CONTRIB_DOMAIN,
            bits=blocks.bits,
            block_size=blocks.size,
            gather_axis=0,
            quantize_axis=1,
        )
        width = table.weight.shape[1]
        if width != count * blocks.size:
            bounds = [editor.vector(x) for x in (0, width, -1)]
            (result,) = editor.before(node, "Slice", [result, *bounds])
        editor.replace(node, result)
        return f"{blocks.bits}-bit rows in blocks of {blocks.size}"

    def _weight(
        self, key: tuple[str, bool, float], holder: Product | Table, bits: int
    ) -> tuple[Any, Any, Any, Blocks]:
        stored = self._stored.get((*key, bits))
        if stored is None:
            blocks = quantize_blocks(holder.matrix(), bits, BLOCK[bits])
            name = f"{key[0]}_{bits}bit"
            constant = self._editor.constant
            zero_points = blocks.zero_points
            stored = (
                constant(name, blocks.data),
                constant(f"{name}_scale", blocks.scales),
                None if zero_points is None else constant(f"{name}_zero_point", zero_points),
                blocks,
            )
            self._stored[(*key, bits)] = stored
        return stored
