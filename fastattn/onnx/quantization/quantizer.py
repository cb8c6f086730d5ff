"""Precisions below float32 for a finished ONNX graph, each decision recorded with its reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from numpy.typing import NDArray
from onnx_ir.passes import Sequential, common

from fastattn.onnx.quantization.block_products import BLOCK, BlockWeights
from fastattn.onnx.quantization.editing import Editor
from fastattn.onnx.quantization.half import to_half
from fastattn.onnx.quantization.int8_products import Int8Weights
from fastattn.onnx.quantization.processor import int8_instructions, saturates_products
from fastattn.onnx.quantization.products import Candidates, Product, Table, find_candidates
from fastattn.onnx.quantization.static_products import add_static_products

__all__ = ["PRECISIONS", "Batches", "quantize"]

Batches = Iterable[Mapping[str, NDArray[Any]]]

_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

# Who runs it faster than float32.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "int8": (_CPU,),
    "int8-weight": (_CPU, _CUDA),
    "int4-weight": (_CPU, _CUDA),
    "fp16": (_CUDA,),
}

_BITS = {"int8-weight": 8, "int4-weight": 4}


def quantize(
    model: Any,
    precision: str,
    *,
    provider: str,
    calibration: Batches | None = None,
    reduce_range: bool | None = None,
    contrib: bool = True,
) -> list[dict[str, Any]]:
    """Bring a float32 graph to `precision`, in place.

    Args:
        model: an `onnx_ir.Model`; weights that lie in files are read one at a time and stay there otherwise.
        precision: "int8" (activations uint8, weights int8 an output; attention and norms stay float32),
            "int8-weight" or "int4-weight" (weights in blocks, for decoding), or "fp16".
        provider: ONNX Runtime's execution provider that will run the graph.
        calibration: for "int8", typical inputs of the graph: activation ranges are then constants measured
            on them, and outliers are scaled away. Without it, ranges are taken from each call's activations.
        reduce_range: for "int8", weights of 7 bits: right on x86 processors without VNNI, where 8 bits
            overflow. None asks this processor.
        contrib: whether ONNX Runtime's own operators may be used; False leaves "int8" and "fp16", and
            stores an embedding apart from a head tied to it.

    Returns:
        What was done to which nodes and why: dicts of "what", "count", "how" and "why"; JSON-able. One that
        speaks of a part of those counted before it has "of_them" for "count".

    Raises:
        ValueError: an unknown precision, one that `provider` or `contrib` rules out, a graph without anything
            to quantize, a weight that is not finite, or calibration inputs that are not the graph's.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; there are {', '.join(map(repr, PRECISIONS))}")
    if provider not in PRECISIONS[precision]:
        raise ValueError(f"{precision!r} is for {' and '.join(PRECISIONS[precision])}, not for {provider}")
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration is for 'int8'; {precision!r} looks at the weights alone")
    if reduce_range is not None and precision != "int8":
        raise ValueError(f"reduce_range is for 'int8', not for {precision!r}")
    if not contrib and precision in _BITS:
        raise ValueError(f"{precision!r} needs ONNX Runtime's own operators; without them there is 'int8'")
    if precision == "fp16":
        decisions = to_half(model)
    else:
        decisions = _quantized(model, precision, calibration, reduce_range, contrib)
    Sequential(common.RemoveUnusedNodesPass(), common.RemoveUnusedOpsetsPass(), common.NameFixPass())(model)
    return decisions


def _quantized(
    model: Any, precision: str, calibration: Batches | None, reduce_range: bool | None, contrib: bool
) -> list[dict[str, Any]]:
    found = find_candidates(model)
    if not found.products:
        raise ValueError(
            f"{precision!r}: the graph {model.graph.name!r} has no matrix product with a constant float32 "
            "weight" + "".join(f"; {count} {what}: {why}" for (what, why), count in found.left.items())
        )
    if precision == "int8":
        decisions = _int8(model, found, calibration, reduce_range, contrib)
    else:
        decisions = _weights_only(model, found, _BITS[precision])
    return decisions + _left(found.left)


def _int8(
    model: Any,
    found: Candidates,
    calibration: Batches | None,
    reduce_range: bool | None,
    contrib: bool,
) -> list[dict[str, Any]]:
    reduced = saturates_products() if reduce_range is None else reduce_range
    because = "asked for" if reduce_range is not None else f"this processor has {_instructions(reduced)}"
    bits = f"{'7' if reduced else '8'}-bit weights: {because}"
    editor = Editor(model, contrib)
    tied = {table.weight.name for table in found.tables} if contrib else set()
    shared = [product for product in found.products if product.transposed and product.weight.name in tied]
    others = [product for product in found.products if not any(product is each for each in shared)]
    weights = Int8Weights(editor, reduced, contrib)
    decisions = []
    measured = [] if calibration is None else [x for x in others if x.rows.graph is model.graph]
    if calibration is not None and measured:
        split = add_static_products(model, editor, weights, measured, calibration)
        how = "uint8 activations in measured ranges, int8 weights by output"
        decisions.append(_decision("products", len(measured), how, bits))
        if split:
            how = "of these with further columns for what outlier channels have beyond the range"
            decisions.append({"what": "products", "of_them": split, "how": how, "why": "accuracy"})
    by_call = [x for x in others if not any(x is each for each in measured)]
    for product in by_call:
        weights.product(product)
    if by_call:
        how = "uint8 activations in each call's range, int8 weights by output"
        decisions.append(_decision("products", len(by_call), how, bits))
    if not contrib:
        return decisions + _tables(found, weights.table)
    blocks = BlockWeights(editor, 8)
    return decisions + _blocks(blocks, shared, 8, "its table is stored once") + _tables(found, blocks.table)


def _weights_only(model: Any, found: Candidates, bits: int) -> list[dict[str, Any]]:
    blocks = BlockWeights(Editor(model), bits)
    why = "one token at a time is bound by reading weights"
    return _blocks(blocks, found.products, bits, why) + _tables(found, blocks.table)


def _blocks(blocks: BlockWeights, products: list[Product], bits: int, why: str) -> list[dict[str, Any]]:
    for product in products:
        blocks.product(product)
    how = f"{bits}-bit weights in blocks of {BLOCK[bits]}"
    return [_decision("products", len(products), how, why)] if products else []


def _tables(found: Candidates, store: Callable[[Table], str]) -> list[dict[str, Any]]:
    counts = Counter(store(table) for table in found.tables)
    return [_decision("embedding tables", count, how, "the file's size") for how, count in counts.items()]


def _instructions(reduced: bool) -> str:
    return int8_instructions() or ("no VNNI, whose 16-bit sums overflow" if reduced else "no known limit")


def _decision(what: str, count: int, how: str, why: str) -> dict[str, Any]:
    return {"what": what, "count": count, "how": how, "why": why}


def _left(left: Counter[tuple[str, str]]) -> list[dict[str, Any]]:
    return [_decision(what, count, "left in float32", why) for (what, why), count in left.items()]
