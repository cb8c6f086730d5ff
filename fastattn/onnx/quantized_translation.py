"""ONNX face of `quantized_linear`: integer products, weight-only products, and dequantized ones where the
target has neither.

What is done to a weight (a transposition, an offset, another packing) is emitted as nodes of constants, which
ONNX Runtime computes once as it loads the graph; the file holds the weight as it is stored.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op

from fastattn.onnx.graph import CONTRIB_DOMAIN, cast, emit, number, vector
from fastattn.onnx.pointwise_translations import gelu
from fastattn.onnx.quantization.processor import saturates_products
from fastattn.onnx.targets import current_target
from fastattn.ops.int4_tiles import TILE_ROWS
from fastattn.ops.packed_weight import pack_int4

__all__ = ["quantized_linear", "settle_zero_points"]

# Elements that share a scale in an 8-bit MatMulNBits, whose own have one a row: a power of two it takes.
_BLOCK_8BIT = 128

# Activations stay float32 within MatMulNBits, as within the operation; 4 would round them to 8 bits.
_FLOAT_ACTIVATIONS = 1


def quantized_linear(
    x: Any, values: Any, scales: Any, zero_points: Any | None, input_scales: Any | None, bias: Any | None,
    scheme: str, in_features: int, group_size: int, layout: str, activation: str | None,
) -> Any:  # fmt: skip
    """`fastattn::quantized_linear`. "fp8" is refused before it gets here (see `convert`)."""
    rows = cast(x, x.dtype, ir.DataType.FLOAT)
    single = len(x.shape) == 1
    if single:
        rows = op.Unsqueeze(rows, [0])
    if input_scales is not None:
        rows = op.Div(rows, input_scales)
    if scheme == "int8":
        result = _integer_product(rows, values, scales)
    elif scheme == "int8-weight":
        result = _eight_bit_product(rows, values, scales, in_features)
    else:
        assert zero_points is not None
        packed = op.Cast(values, to=ir.DataType.UINT8)
        if layout != "plain":
            packed = _untiled(packed, values.shape[0], in_features)
        result = _four_bit_product(rows, packed, scales, zero_points, in_features, group_size)
    if bias is not None:
        result = op.Add(result, cast(bias, bias.dtype, ir.DataType.FLOAT))
    result = _activated(result, activation)
    return cast(op.Squeeze(result, [0]) if single else result, ir.DataType.FLOAT, x.dtype)


def _activated(x: Any, activation: str | None) -> Any:
    if activation is None:
        return x
    if activation == "relu":
        return op.Relu(x)
    if activation == "silu":
        return op.Mul(x, op.Sigmoid(x))
    return gelu(x, ir.DataType.FLOAT, "tanh" if activation == "gelu_tanh" else "none")


def _integer_product(rows: Any, values: Any, scales: Any) -> Any:
    """Rows rounded to 8 bits, each with a scale of its own, times int8. (The operators that quantize
    activations themselves have one scale for all rows.)
    """
    unit = _unit(rows, 127.0)
    scaled = op.Div(rows, unit)
    if not _has_integer_products():
        return op.Mul(_float_product(op.Round(scaled), values, scales), unit)
    return op.Mul(_levels_product(scaled, values, scales), unit)


def _eight_bit_product(rows: Any, values: Any, scales: Any, width: int) -> Any:
    """Rows as whole numbers of 24 bits, these as three digits base 256, and the digits times int8.

    K = 768, N = 3072 on one VNNI thread, M = 1, 128: 0.11, 2.7 ms; MatMulNBits, which has no kernel of 8 bits
    for float32 activations, 3.4, 11; a float32 product 0.3, 3.5.
    """
    if _has_integer_products():
        unit = _unit(rows, 8355000.0)
        numbers = op.Div(rows, unit)
        # Rounded so that what is left for the next digit lies between -128 and 127, not at 128.
        high = op.Floor(op.Add(op.Mul(numbers, 2.0**-16), 0.5 + 2.0**-9))
        rest = op.Sub(numbers, op.Mul(high, 2.0**16))
        middle = op.Floor(op.Add(op.Mul(rest, 2.0**-8), 0.5))
        low = op.Sub(rest, op.Mul(middle, 2.0**8))
        product = _levels_product(op.Concat(high, middle, low, axis=0), values, scales)
        of_high, of_middle, of_low = op.Split(product, axis=0, num_outputs=3)
        lower = op.Add(op.Mul(of_middle, 2.0**8), of_low)
        return op.Mul(op.Add(op.Mul(of_high, 2.0**16), lower), unit)
    if not current_target().contrib or current_target().provider == "CPUExecutionProvider":
        return _float_product(rows, values, scales)
    outputs, blocks = values.shape[0], -(-width // _BLOCK_8BIT)
    # MatMulNBits has unsigned numbers around 128.
    shifted = op.Add(op.Cast(values, to=ir.DataType.INT32), number(128, ir.DataType.INT32))
    data = _blocks(op.Cast(shifted, to=ir.DataType.UINT8), outputs, width, blocks, _BLOCK_8BIT)
    factors = op.Expand(scales, vector(outputs, blocks))
    return _nbits([rows, data, factors], width, outputs, 8, _BLOCK_8BIT)


def _has_integer_products() -> bool:
    """A GPU has none, and on x86 without VNNI those of ONNX Runtime overflow."""
    return current_target().provider == "CPUExecutionProvider" and not saturates_products()


def _unit(rows: Any, levels: float) -> Any:
    """What so many levels of each row's largest magnitude are worth, never 0."""
    unit = op.Div(op.ReduceMax(op.Abs(rows), [-1], keepdims=1), levels)
    return op.Max(unit, op.Constant(value_float=torch.finfo(torch.float32).tiny))


def _levels_product(scaled: Any, values: Any, scales: Any) -> Any:
    """Numbers of -128 to 127, rounded, times int8 with a scale an output: as uint8 around 128, the pair
    (U8S8) that ONNX Runtime's fast kernels take.
    """
    one, middle = op.Constant(value_float=1.0), number(128, ir.DataType.UINT8)
    levels = op.QuantizeLinear(scaled, one, middle)
    weight, by_output = op.Transpose(values, perm=[1, 0]), op.Squeeze(scales, [1])
    if current_target().contrib:
        product: Any = emit("MatMulIntegerToFloat", [levels, weight, one, by_output, middle], CONTRIB_DOMAIN)
        return product
    return op.Mul(op.Cast(op.MatMulInteger(levels, weight, middle), to=ir.DataType.FLOAT), by_output)


def _float_product(rows: Any, values: Any, scales: Any) -> Any:
    """In float32. (Not by DequantizeLinear: before a product ONNX Runtime takes it for leave to round the
    activations to 8 bits.)
    """
    weight = op.Transpose(op.Cast(values, to=ir.DataType.FLOAT), perm=[1, 0])
    return op.Mul(op.MatMul(rows, weight), op.Squeeze(scales, [1]))


def _four_bit_product(
    rows: Any, values: Any, scales: Any, zero_points: Any, width: int, group_size: int
) -> Any:
    outputs, groups = scales.shape
    data = _blocks(values, outputs, -(-width // 2), groups, group_size // 2)
    if current_target().contrib:
        return _nbits([rows, data, scales, zero_points], width, outputs, 4, group_size)
    columns = op.Concat(*(op.Unsqueeze(half, [3]) for half in _halves(data)), axis=3)
    numbers = op.Cast(op.Reshape(columns, vector(outputs, groups, group_size)), to=ir.DataType.FLOAT)
    weight = op.Mul(op.Sub(numbers, op.Unsqueeze(zero_points, [2])), op.Unsqueeze(scales, [2]))
    weight = op.Reshape(weight, vector(outputs, groups * group_size))
    if groups * group_size != width:
        weight = op.Slice(weight, vector(0), vector(width), vector(1))
    return op.MatMul(rows, op.Transpose(weight, perm=[1, 0]))


def _blocks(data: Any, outputs: int, width: int, blocks: int, size: int) -> Any:
    """uint8 [N, width] as [N, blocks, size], filled up with zeros, which the product leaves out."""
    if blocks * size != width:
        data = op.Pad(data, vector(0, 0, 0, blocks * size - width))
    return op.Reshape(data, vector(outputs, blocks, size))


def _nbits(inputs: list[Any], width: int, outputs: int, bits: int, size: int) -> Any:
    return emit(
        "MatMulNBits",
        inputs,
        CONTRIB_DOMAIN,
        K=width,
        N=outputs,
        bits=bits,
        block_size=size,
        accuracy_level=_FLOAT_ACTIVATIONS,
    )


def _halves(data: Any) -> tuple[Any, Any]:
    """The low and the high four bits of bytes."""
    low = op.BitwiseAnd(data, number(15, ir.DataType.UINT8))
    four = number(4, ir.DataType.UINT8)
    return low, op.BitShift(data, four, direction="RIGHT")


def _untiled(values: Any, outputs: int, width: int) -> Any:
    """`int4_tiles.untiled`."""
    tiles = op.Reshape(values, vector(-1, width, TILE_ROWS // 2))
    integers = op.Concat(*(op.Transpose(half, perm=[0, 2, 1]) for half in _halves(tiles)), axis=1)
    pairs = op.Reshape(integers, vector(outputs, width // 2, 2))
    even, odd = (op.Gather(pairs, op.Constant(value_int=index), axis=2) for index in (0, 1))
    four = number(4, ir.DataType.UINT8)
    return op.BitwiseOr(even, op.BitShift(odd, four, direction="LEFT"))


def settle_zero_points(model: Any) -> int:
    """Zero points of MatMulNBits that are whole numbers become four bits each, which its fast kernels need,
    and none at all where all are 8; how many. While a graph is translated their values are not known.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "MatMulNBits" or len(node.inputs) < 4 or node.inputs[3] is None:
            continue
        value = node.inputs[3]
        if value.const_value is None or value.const_value.dtype != ir.DataType.FLOAT:
            continue
        points = torch.from_numpy(value.const_value.numpy().copy())
        if not torch.equal(points, points.round().clamp(0, 15)):
            continue
        count += 1
        if bool((points == 8).all()):
            node.replace_input_with(3, None)
            continue
        name = f"{value.name}_4bit"
        if name not in model.graph.initializers:
            packed = ir.tensor(pack_int4(points.to(torch.uint8)).view(torch.uint8).numpy(), name=name)
            model.graph.register_initializer(
                ir.Value(
                    name=name,
                    const_value=packed,
                    type=ir.TensorType(packed.dtype),
                    shape=ir.Shape(packed.numpy().shape),
                )
            )
        node.replace_input_with(3, model.graph.initializers[name])
    return count
