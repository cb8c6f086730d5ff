"""int8 with measured ranges: what they are, outlier channels, and the graph while it is measured."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper
from quantized_graphs import CPU, close, graph, linear, operators, random, rounded_rows, run, stored

from fastattn.onnx.quantization import quantize
from fastattn.onnx.quantization.calibration import ChannelRange, channel_ranges
from fastattn.onnx.quantization.static_products import choose_range


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def test_ranges_are_the_extremes_of_all_batches_and_the_graph_stays_as_it_was():
    model = linear(random(32, 24))
    x = model.graph.inputs[0]
    batches = [{"x": random(5, 24, seed=seed)} for seed in range(3)] + [{"x": np.zeros((0, 24), np.float32)}]
    (found,) = channel_ranges(model, [x], batches)
    rows = np.concatenate([batch["x"] for batch in batches])
    assert np.array_equal(found.low, np.minimum(rows.min(0), 0))
    assert np.array_equal(found.high, np.maximum(rows.max(0), 0))
    assert operators(model) == ["Gemm"]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_products_compute_what_the_stored_numbers_say():
    weight, bias, x = random(48, 64), random(48, seed=1), random(9, 64, seed=2).clip(-1, 1)
    model = linear(weight, bias)
    decisions = quantize(model, "int8", provider=CPU, calibration=[{"x": x}], reduce_range=False)
    assert "measured ranges" in decisions[0]["how"]
    assert "DynamicQuantizeLinear" not in operators(model)
    scale, zero = stored(model, "x_int8_scale"), int(stored(model, "x_int8_zero_point"))
    for rows in (x, 3 * x):  # beyond the range: the nearest level
        levels = np.clip(np.rint(rows / scale) + zero, 0, 255).astype(np.float64) - zero
        close(run(model, x=rows)[0], levels * scale @ rounded_rows(weight).T + bias, 1e-5)


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul"])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_outlier_channel_does_not_cost_the_others_their_levels(op_type, sign):
    weight = random(48, 320)
    shape = (200, 320) if op_type == "Gemm" else (2, 100, 320)
    x = random(*shape, seed=2)
    x[..., 17] = sign * np.abs(x[..., 17]) * 8
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    model, dynamic = linear(weight, op_type=op_type), linear(weight, op_type=op_type)
    decisions = quantize(model, "int8", provider=CPU, calibration=[{"x": x}], reduce_range=False)
    quantize(dynamic, "int8", provider=CPU, reduce_range=False)
    assert [each["of_them"] for each in decisions if "of_them" in each] == [1]
    measured = relative_error(run(model, x=x)[0], expected)
    assert measured < 0.5 * relative_error(run(dynamic, x=x)[0], expected)
    assert measured < 0.015
    # Rows without an outlier have the further columns at exactly nothing.
    x[..., 17] = 0
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert relative_error(run(model, x=x)[0], expected) < 0.015


def test_columns_for_outliers_are_few_and_reach_as_far_as_what_was_measured():
    high = np.full(640, 2.0, np.float32)
    high[[5, 600]] = 30.0, 9.0
    found = choose_range(ChannelRange(-np.ones(640, np.float32), high))
    assert set(found.outliers.tolist()) == {5, 600}
    assert len(found.outliers) <= 640 / 32
    low, top = found.bounds
    assert top == pytest.approx(2.0, rel=0.01) and low == pytest.approx(-1.0, rel=0.01)
    for channel, reach in ((5, 30.0), (600, 9.0)):
        columns = found.outliers == channel
        assert found.shares[columns].sum() == pytest.approx(1)
        assert ((reach - top) * found.shares[columns] <= top * 1.01).all()


@pytest.mark.parametrize("low, high", [(0.0, 0.0), (0.0, 5.0), (-5.0, 0.0), (-1e-38, 1e-38), (-1e38, 1e38)])
def test_ranges_without_spread_or_of_one_sign(low, high):
    found = choose_range(ChannelRange(np.full(64, low, np.float32), np.full(64, high, np.float32)))
    assert np.isfinite(found.scale) and found.scale > 0
    assert len(found.outliers) == 0
    bottom, top = found.bounds
    assert bottom <= low * 0.99 + 1e-30 and top >= high * 0.99 - 1e-30


def test_activations_shared_by_products_are_measured_and_quantized_once():
    constants = {f"w{i}": random(24, 24, seed=i) for i in range(3)}
    nodes = [helper.make_node("Relu", ["x"], ["r"])]
    nodes += [helper.make_node("Gemm", ["r", f"w{i}"], [f"y{i}"], transB=1) for i in range(3)]
    outputs = {f"y{i}": (TensorProto.FLOAT, ["rows", 24]) for i in range(3)}
    model = graph(nodes, {"x": (TensorProto.FLOAT, ["rows", 24])}, outputs, constants)
    x = random(50, 24, seed=5)
    quantize(model, "int8", provider=CPU, calibration=[{"x": x}])
    assert operators(model).count("QuantizeLinear") == 1
    for found, weight in zip(run(model, x=x), constants.values(), strict=True):
        assert relative_error(found, np.maximum(x, 0).astype(np.float64) @ weight.T) < 0.02
