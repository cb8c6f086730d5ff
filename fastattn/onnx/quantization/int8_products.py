"""int8 products: activations in uint8, weights in int8 with a scale an output, biases float32.

ONNX Runtime's fast int8 kernels take just this pair of types (U8S8); with two unsigned or two signed ones a
product is two to three times slower than float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastattn.onnx.graph import CONTRIB_DOMAIN
from fastattn.onnx.quantization.editing import Editor
from fastattn.onnx.quantization.products import Product, Table

__all__ = ["Int8Weights", "quantize_rows"]

# Below this a scale's reciprocal overflows float32; such rows are zero for every purpose.
_SMALLEST_SCALE = 1e-37


def quantize_rows(matrix: Tensor, levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round float32 [N, K] to -levels..levels with a scale a row: int8 [K, N] and float32 [N]."""
    scale = (matrix.abs().amax(1) / levels).clamp(min=_SMALLEST_SCALE)
    rounded = (matrix / scale[:, None]).round_().clamp_(-levels, levels).to(torch.int8)
    return np.ascontiguousarray(rounded.numpy().T), scale.numpy()


class Int8Weights:
    """Rewrites products whose activations are quantized while the model runs."""

    def __init__(self, editor: Editor, reduce_range: bool, contrib: bool = True) -> None:
        self._editor = editor
        self._contrib = contrib
        # Where VNNI is missing, pairs of U8S8 products are added in 16 bits, which 8-bit weights overflow.
        self._levels = 63 if reduce_range else 127
        self._tables: dict[str, tuple[Any, Any]] = {}
        self._weights: dict[tuple[str, bool, float, bytes], tuple[Any, Any]] = {}
        self._activations: dict[tuple[Any, Any], list[Any]] = {}

    def product(self, product: Product) -> None:
        """`product` with activations quantized by each call; those of the same activations share that.

        Where there is only one product, ONNX Runtime makes both nodes a DynamicQuantizeMatMul as it loads.
        """
        node = product.node
        place = (node.graph, product.rows)
        quantized = self._activations.get(place)
        if quantized is None:
            quantized = self._editor.before(node, "DynamicQuantizeLinear", [product.rows], outputs=3)
            self._activations[place] = quantized
        self.replace(product, quantized)

    def replace(
        self, product: Product, quantized: Sequence[Any], repeated: NDArray[np.int64] | None = None
    ) -> None:
        """`product` as MatMulIntegerToFloat of its `quantized` activations: levels, scale, zero point.

        `repeated`: inputs whose weights stand once more behind the K others, in this order.
        """
        editor, node = self._editor, product.node
        levels, scale, zero_point = quantized
        weight, weight_scale = self._weight(product, repeated)
        bias = editor.row(node, product.bias)
        if self._contrib:
            inputs = [levels, weight, scale, weight_scale, zero_point, None, bias]
            (result,) = editor.before(node, "MatMulIntegerToFloat", inputs, CONTRIB_DOMAIN)
        else:
            # In the order in which ONNX Runtime finds it and makes it the operator above.
            (summed,) = editor.before(node, "MatMulInteger", [levels, weight, zero_point])
            (floats,) = editor.before(node, "Cast", [summed], to=ir.DataType.FLOAT)
            (factor,) = editor.before(node, "Mul", [scale, weight_scale])
            (result,) = editor.before(node, "Mul", [floats, factor])
            if bias is not None:
                (result,) = editor.before(node, "Add", [result, bias])
        editor.replace(node, result)

    def table(self, table: Table) -> str:
        """`table`'s Gather as rows of int8 and a scale each, in standard operators; how it is stored."""
        editor, node = self._editor, table.node
        stored = self._tables.get(table.weight.name)
        if stored is None:
            data, scale = quantize_rows(table.matrix(), 127)
            name = f"{table.weight.name}_int8"
            stored = (editor.constant(name, data.T), editor.constant(f"{name}_scale", scale[:, None]))
            self._tables[table.weight.name] = stored
        picked, scales = (editor.before(node, "Gather", [each, node.inputs[1]])[0] for each in stored)
        (floats,) = editor.before(node, "Cast", [picked], to=ir.DataType.FLOAT)
        editor.replace(node, editor.before(node, "Mul", [floats, scales])[0])
        return "8-bit rows, a scale each"

    def _weight(self, product: Product, repeated: NDArray[np.int64] | None) -> tuple[Any, Any]:
        key = (*product.key, b"" if repeated is None else repeated.tobytes())
        stored = self._weights.get(key)
        if stored is None:
            matrix = product.matrix()
            if repeated is not None and len(repeated):
                matrix = torch.cat([matrix, matrix[:, torch.from_numpy(repeated)]], 1)
            data, scale = quantize_rows(matrix, self._levels)
            name = f"{product.weight.name}_int8"
            stored = (self._editor.constant(name, data), self._editor.constant(f"{name}_scale", scale))
            self._weights[key] = stored
        return stored
