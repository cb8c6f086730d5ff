"""int8 products whose activation ranges are constants, measured on typical inputs.

Transformers have a few channels whose values are many times those of the others, and a range that covers
them leaves the others a handful of levels. So the range covers the others, and what of those few channels
lies beyond it becomes further columns of the same int8 product, with weights repeated: LLM.int8's split
(Dettmers et al. 2022, arXiv 2208.07339) without a second product. SmoothQuant's migration into the weights
is not used: in post-norm models a norm's result is also the residual, so that it cannot be folded, and on
all-MiniLM-L6-v2 it left twice the error, since weights that are multiplied are rounded more coarsely.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.onnx.quantization.calibration import ChannelRange, channel_ranges
from fastattn.onnx.quantization.editing import Editor
from fastattn.onnx.quantization.int8_products import Int8Weights
from fastattn.onnx.quantization.products import Product

__all__ = ["StaticRange", "add_static_products", "choose_range"]

# Further columns for outliers, as a part of the channels there are: their price is the file's size.
_COLUMNS = 1 / 32

# Outliers are split off where that leaves less than this of the range: the columns take seven small nodes.
_WORTHWHILE = 0.8

_SMALLEST_SCALE = 1e-30


@dataclass(frozen=True)
class StaticRange:
    """uint8 levels of one activation.

    Attributes:
        scale: of a level.
        zero_point: the level of 0.
        outliers: int64, the channels of the further columns; one that reaches several times as far as the
            range stands there as often.
        shares: float32, what part of its channel's excess each of these columns holds.
    """

    scale: np.float32
    zero_point: np.uint8
    outliers: NDArray[np.int64]
    shares: NDArray[np.float32]

    @property
    def bounds(self) -> tuple[np.float32, np.float32]:
        """The least and greatest value that has a level."""
        zero = np.float32(self.zero_point)
        return (np.float32(0) - zero) * self.scale, (np.float32(255) - zero) * self.scale


def choose_range(channels: ChannelRange) -> StaticRange:
    """The range of all channels, or of all but some that stand out."""
    low, high = channels.low, channels.high
    order = np.argsort(np.maximum(-low, high))
    kept, copies = order, np.zeros(0, np.int64)
    narrowest = _WORTHWHILE * float(high.max() - low.min())
    columns = int(len(order) * _COLUMNS)
    for count in range(1, columns + 1):
        inner, outer = order[:-count], order[-count:]
        least, greatest = float(low[inner].min()), float(high[inner].max())
        above = (high[outer] - greatest) / max(greatest, _SMALLEST_SCALE)
        below = (least - low[outer]) / max(-least, _SMALLEST_SCALE)
        needed = np.ceil(np.maximum(np.maximum(above, below), 1.0))
        if greatest - least < narrowest and needed.sum() <= columns:
            kept, copies, narrowest = inner, needed.astype(np.int64), greatest - least
    least, greatest = float(low[kept].min()), float(high[kept].max())
    scale = np.float32(max((greatest - least) / 255.0, _SMALLEST_SCALE))
    zero_point = np.uint8(np.clip(np.rint(-least / scale), 0, 255))
    outliers = np.repeat(order[len(kept) :], copies).astype(np.int64)
    return StaticRange(scale, zero_point, outliers, (1.0 / np.repeat(copies, copies)).astype(np.float32))


def add_static_products(
    model: Any,
    editor: Editor,
    weights: Int8Weights,
    products: Sequence[Product],
    batches: Iterable[Mapping[str, NDArray[Any]]],
) -> int:
    """Rewrite `products`, all of the main graph; returns how many have columns for outliers.

    Raises:
        ValueError: as `channel_ranges`.
    """
    activations = list({product.rows: None for product in products})
    ranges = map(choose_range, channel_ranges(model, activations, batches))
    chosen = dict(zip(activations, ranges, strict=True))
    levels = [chosen[product.rows] for product in products]
    quantized: dict[Any, list[Any]] = {}
    for product, each in zip(products, levels, strict=True):
        place = (product.node.graph, product.rows)
        if place not in quantized:
            quantized[place] = _quantized(editor, product.node, product.rows, each)
        weights.replace(product, quantized[place], each.outliers)
    return sum(len(each.outliers) > 0 for each in levels)


def _quantized(editor: Editor, node: Any, rows: Any, levels: StaticRange) -> list[Any]:
    """The levels of `rows` [..., K + columns], their scale and zero point, in front of `node`."""
    name = f"{rows.name}_int8"
    scale = editor.constant(f"{name}_scale", np.array(levels.scale))
    zero_point = editor.constant(f"{name}_zero_point", np.array(levels.zero_point))
    (result,) = editor.before(node, "QuantizeLinear", [rows, scale, zero_point])
    if len(levels.outliers):
        indices = editor.constant(f"{name}_outliers", levels.outliers)
        low, high = (
            editor.constant(f"{name}_{end}", np.array(bound))
            for end, bound in zip(("low", "high"), levels.bounds, strict=True)
        )
        shares = editor.constant(f"{name}_shares", levels.shares)
        (picked,) = editor.before(node, "Gather", [rows, indices], axis=-1)
        (clipped,) = editor.before(node, "Clip", [picked, low, high])
        (beyond,) = editor.before(node, "Sub", [picked, clipped])
        (shared,) = editor.before(node, "Mul", [beyond, shares])
        (columns,) = editor.before(node, "QuantizeLinear", [shared, scale, zero_point])
        (result,) = editor.before(node, "Concat", [result, columns], axis=-1)
    return [result, scale, zero_point]
