"""Weights in blocks: bits, scales and zero points by the operators' rules, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper
from quantized_graphs import CPU, close, graph, linear, operators, random, run

from fastattn.onnx.quantization import quantize
from fastattn.onnx.quantization.blocks import quantize_blocks


def dequantized(blocks, width):
    """float64 [N, K] by the rules of MatMulNBits."""
    data, zero = blocks.data, np.full(blocks.scales.shape, 128)
    if blocks.bits == 4:
        data = np.stack([data & 15, data >> 4], -1).reshape(*data.shape[:2], -1)
        zero = np.stack([blocks.zero_points & 15, blocks.zero_points >> 4], -1)
        zero = zero.reshape(len(data), -1)[:, : data.shape[1]]
    values = (data.astype(np.float64) - zero[..., None]) * blocks.scales[..., None]
    return values.reshape(len(data), -1)[:, :width]


@pytest.mark.parametrize("precision, bits, size", [("int8-weight", 8, 128), ("int4-weight", 4, 128)])
@pytest.mark.parametrize("inputs", [16, 100, 128, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_products_read_the_stored_weights(precision, bits, size, inputs, bias):
    weight, offset = random(33, inputs), random(33, seed=1)
    model = linear(weight, offset if bias else None)
    decisions = quantize(model, precision, provider=CPU)
    assert operators(model) == ["MatMulNBits"]
    assert [each["count"] for each in decisions] == [1]
    # One element a row is rounded to 127 of 127 levels by the operator: its activations are exact.
    found = run(model, x=np.eye(inputs, dtype=np.float32))[0]
    expected = dequantized(quantize_blocks(weight, bits, size), inputs).T + (offset if bias else 0)
    close(found, expected, 1e-5)
    x = random(6, inputs, seed=2)
    close(run(model, x=x)[0], x @ (expected - (offset if bias else 0)) + (offset if bias else 0), 0.02)


def test_eight_bits_are_within_half_a_level():
    weight = random(9, 300)
    blocks = quantize_blocks(weight, 8, 128)
    error = np.abs(dequantized(blocks, 300) - weight)
    level = np.repeat(blocks.scales, 128, axis=1)[:, :300]
    assert (error <= 0.50001 * level).all()
    assert blocks.zero_points is None


def test_four_bits_have_less_error_than_the_extremes_give():
    weight = random(64, 320)
    blocks = quantize_blocks(weight, 4, 32)
    grouped = weight.reshape(64, 10, 32)
    low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    plain = (np.clip(np.rint(grouped / scale + zero), 0, 15) - zero) * scale
    error = np.square(dequantized(blocks, 320) - weight).reshape(64, 10, 32).sum(-1)
    assert error.sum() < 0.95 * np.square(plain - grouped).sum()


@pytest.mark.parametrize("kind", ["positive", "negative", "one value", "zero"])
def test_four_bit_blocks_of_one_sign(kind):
    weight = {
        "positive": np.abs(random(8, 64)) + 1,
        "negative": -np.abs(random(8, 64)) - 1,
        "one value": np.full((8, 64), 3.7, np.float32),
        "zero": np.zeros((8, 64), np.float32),
    }[kind]
    found = dequantized(quantize_blocks(weight, 4, 32), 64)
    if kind == "zero":
        assert not found.any()
    else:
        assert np.abs(found - weight).max() <= np.abs(weight).max() / 15


def test_rows_beyond_a_worker_s_share_are_all_there():
    weight = random(5000, 64)
    found = dequantized(quantize_blocks(weight, 8, 128), 64)
    assert np.abs(found - weight).max() <= np.abs(weight).max() / 253


def test_an_untied_table_has_eight_bits_where_products_have_four():
    table, head = random(700, 64), random(900, 64, seed=1)
    model = graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("Gemm", ["rows", "head"], ["logits"], transB=1),
        ],
        {"ids": (TensorProto.INT64, ["tokens"])},
        {"rows": (TensorProto.FLOAT, ["tokens", 64]), "logits": (TensorProto.FLOAT, ["tokens", 900])},
        {"table": table, "head": head},
    )
    decisions = quantize(model, "int4-weight", provider=CPU)
    assert [(each["what"], each["how"][0]) for each in decisions] == [
        ("products", "4"),
        ("embedding tables", "8"),
    ]
    ids = np.array([3, 699])
    close(run(model, ids=ids)[0], table[ids].astype(np.float64), 0.005)
