"""Weight-only products and embedding tables: MatMulNBits and GatherBlockQuantized, which may share data."""

from __future__ import annotations

from typing import Any

from fastattn.onnx.graph import CONTRIB_DOMAIN
from fastattn.onnx.quantization.blocks import Blocks, quantize_blocks
from fastattn.onnx.quantization.editing import Editor
from fastattn.onnx.quantization.products import Product, Table

__all__ = ["BLOCK", "BlockWeights"]

# Elements of a row that share a scale. All of GPT-2's products for one token on one VNNI thread: 8 bits in
# blocks of 32, 128: 13.8, 11.9 ms; 4 bits in blocks of 32, 64, 128: 9.7, 8.0, 7.4 ms, where the error is 7.8,
# 8.7 and 9.5% of a normal weight. A prompt of 128 tokens: 3.1, 2.9, 2.2 ms a product of 768 x 3072.
BLOCK = {8: 128, 4: 128}

# The activations are rounded to 8 bits a block inside the operator, which is what makes it fast.
_INT8_ACTIVATIONS = 4


class BlockWeights:
    """Rewrites products and tables; each weight is quantized and stored once however many nodes use it."""

    def __init__(self, editor: Editor, bits: int) -> None:
        self._editor = editor
        self._bits = bits
        self._stored: dict[tuple[str, bool, float], tuple[Any, Any, Any, Blocks]] = {}
        self._tables: dict[str, tuple[Any, Any, Any, Blocks]] = {}

    def product(self, product: Product) -> None:
        """`product` as MatMulNBits, bias included."""
        data, scales, zero_points, blocks = self._weight(product)
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

        A table that no product shares has 8 bits and one scale a row in either case: a token reads a single
        row, so that fewer bits save no time.
        """
        editor, node, weight = self._editor, table.node, table.weight
        width = int(weight.shape[1])
        stored = self._stored.get((weight.name, True, 1.0))
        if stored is None:
            data, scales, zero_points, blocks = self._rows(table)
        else:
            data, scales, zero_points, blocks = stored
            count, stored_bytes = blocks.data.shape[1:]
            data = editor.before(node, "Reshape", [data, editor.vector(-1, count * stored_bytes)])[0]
        (result,) = editor.before(
            node,
            "GatherBlockQuantized",
            [data, node.inputs[1], scales, zero_points],
            CONTRIB_DOMAIN,
            bits=blocks.bits,
            block_size=blocks.size,
            gather_axis=0,
            quantize_axis=1,
        )
        if stored is not None and width % blocks.size:
            bounds = [editor.vector(x) for x in (0, width, -1)]
            (result,) = editor.before(node, "Slice", [result, *bounds])
        editor.replace(node, result)
        if stored is None:
            return "8-bit rows, a scale each"
        return f"{blocks.bits}-bit rows in blocks of {blocks.size}, the data of the head"

    def _rows(self, table: Table) -> tuple[Any, Any, Any, Blocks]:
        """A table's 8-bit rows; a block may be longer than a row, and then needs no filling."""
        found = self._tables.get(table.weight.name)
        if found is None:
            matrix = table.matrix().numpy()
            width = matrix.shape[1]
            blocks = quantize_blocks(matrix, 8, max(16, 1 << (width - 1).bit_length()))
            name, constant = f"{table.weight.name}_8bit", self._editor.constant
            data = constant(name, blocks.data.reshape(len(matrix), -1)[:, :width])
            found = (data, constant(f"{name}_scale", blocks.scales), None, blocks)
            self._tables[table.weight.name] = found
        return found

    def _weight(self, product: Product) -> tuple[Any, Any, Any, Blocks]:
        stored = self._stored.get(product.key)
        if stored is None:
            blocks = quantize_blocks(product.matrix().numpy(), self._bits, BLOCK[self._bits])
            name, constant = f"{product.weight.name}_{self._bits}bit", self._editor.constant
            zero_points = blocks.zero_points
            stored = (
                constant(name, blocks.data),
                constant(f"{name}_scale", blocks.scales),
                None if zero_points is None else constant(f"{name}_zero_point", zero_points),
                blocks,
            )
            self._stored[product.key] = stored
        return stored
