"""float16 graphs: what is halved, what stays exact, and how near they come in ONNX Runtime on the CPU."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from quantized_graphs import CUDA, close, graph, linear, operators, random, run

from fastattn.onnx.quantization import quantize

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


def count(decisions, what, how):
    return sum(each["count"] for each in decisions if each["what"] == what and each["how"] == how)


def test_a_product_between_float32_inputs_and_outputs():
    weight, bias, x = random(48, 64), random(48, seed=1), random(9, 64, seed=2)
    model = linear(weight, bias)
    decisions = quantize(model, "fp16", provider=CUDA)
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {FLOAT}
    assert {value.dtype for value in model.graph.initializers.values()} == {HALF}
    assert count(decisions, "weights", "float16") == 2
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    close(run(model, x=x)[0], x @ weight.T + bias, 2e-3)


def test_positions_and_their_angles_stay_exact():
    """Rotary embeddings at position 5000, which float16 rounds to a multiple of 4."""
    frequencies = (10000.0 ** -(np.arange(16, dtype=np.float32) / 16)).reshape(1, 16)
    table = random(50, 16)
    nodes = [
        helper.make_node("Cast", ["positions"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["floats", "last"], ["column"]),
        helper.make_node("Unsqueeze", ["frequencies", "first"], ["row"]),
        helper.make_node("MatMul", ["column", "row"], ["angles"]),
        helper.make_node("Cos", ["angles"], ["cos"]),
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Mul", ["rows", "cos"], ["y"]),
    ]
    model = graph(
        nodes,
        {"positions": (TensorProto.INT64, [1, "n"]), "ids": (TensorProto.INT64, [1, "n"])},
        {"y": (TensorProto.FLOAT, None)},
        {"frequencies": frequencies, "table": table, "last": np.array([2]), "first": np.array([0])},
    )
    positions, ids = np.array([[0, 1, 4999, 5001]]), np.array([[1, 2, 3, 4]])
    decisions = quantize(model, "fp16", provider=CUDA)
    assert count(decisions, "operators", "left in float32") >= 4
    expected = table[ids] * np.cos(positions[..., None].astype(np.float64) * frequencies)
    close(run(model, positions=positions, ids=ids)[0], expected, 2e-3)


@pytest.mark.parametrize("how", ["computed", "constant"])
def test_masks_are_filled_with_what_float16_has(how):
    """A row that may attend nothing: equal weights, and no NaN."""
    lowest = np.float32(np.finfo(np.float32).min)
    nodes, constants = [], {"table": random(50, 16), "axis": np.array([1])}
    if how == "computed":
        constants |= {"one": np.float32(1), "lowest": lowest}
        nodes += [
            helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.FLOAT),
            helper.make_node("Sub", ["one", "kept"], ["hidden"]),
            helper.make_node("Mul", ["hidden", "lowest"], ["bias"]),
        ]
    else:
        constants |= {"none": np.float32(0), "lowest": lowest}
        nodes += [
            helper.make_node("Cast", ["mask"], ["kept"], to=TensorProto.BOOL),
            helper.make_node("Where", ["kept", "none", "lowest"], ["bias"]),
        ]
    nodes += [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Transpose", ["rows"], ["columns"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["rows", "columns"], ["scores"]),
        helper.make_node("Unsqueeze", ["bias", "axis"], ["wide"]),
        helper.make_node("Add", ["scores", "wide"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["y"], axis=-1),
    ]
    model = graph(
        nodes,
        {"mask": (TensorProto.INT64, ["b", "n"]), "ids": (TensorProto.INT64, ["b", "n"])},
        {"y": (TensorProto.FLOAT, ["b", "n", "n"])},
        constants,
    )
    quantize(model, "fp16", provider=CUDA)
    mask, ids = np.array([[1, 1, 0], [0, 0, 0]]), np.array([[1, 2, 3], [4, 5, 6]])
    (found,) = run(model, mask=mask, ids=ids)
    assert np.isfinite(found).all()
    assert not found[0, :, 2].any()
    rows = constants["table"][ids[0]].astype(np.float64)
    scores = np.exp(rows @ rows[:2].T)
    assert np.abs(found[0, :, :2] - scores / scores.sum(-1, keepdims=True)).max() < 0.02


def test_weights_beyond_its_range_are_clipped_and_counted():
    weight = random(16, 24)
    weight[0, 0] = 1e6
    model = linear(weight)
    decisions = quantize(model, "fp16", provider=CUDA)
    assert count(decisions, "constants", "clipped") == 1
    (stored,) = [value.const_value.numpy() for value in model.graph.initializers.values()]
    assert stored[0, 0] == 65504


def test_weights_are_converted_only_when_the_model_is_saved():
    model = linear(random(16, 24))
    quantize(model, "fp16", provider=CUDA)
    (value,) = model.graph.initializers.values()
    assert isinstance(value.const_value, ir.LazyTensor)


def test_loops_branches_and_sequences():
    """Rows collected in a sequence by a loop whose body uses a weight of the graph around it."""
    weight, table = random(16, 16), random(50, 16, seed=1)
    info = helper.make_tensor_value_info
    sequence = helper.make_tensor_sequence_value_info("kept", TensorProto.FLOAT, None)
    then = helper.make_graph(
        [helper.make_node("MatMul", ["row", "weight"], ["product"])],
        "then",
        [],
        [info("product", TensorProto.FLOAT, None)],
    )
    zeros = helper.make_node(
        "ConstantOfShape", ["width"], ["zeros"], value=numpy_helper.from_array(np.zeros(1, np.float32))
    )
    other = helper.make_graph([zeros], "else", [], [info("zeros", TensorProto.FLOAT, None)])
    body = helper.make_graph(
        [
            helper.make_node("Gather", ["rows", "i"], ["row"]),
            helper.make_node("Equal", ["i", "skipped"], ["skip"]),
            helper.make_node("Not", ["skip"], ["take"]),
            helper.make_node("If", ["take"], ["chosen"], then_branch=then, else_branch=other),
            helper.make_node("SequenceInsert", ["kept", "chosen"], ["longer"]),
            helper.make_node("Identity", ["going"], ["still"]),
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("going", TensorProto.BOOL, []), sequence],
        [
            info("still", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("longer", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("SequenceConstruct", ["seed"], ["start"]),
        helper.make_node("Size", ["ids"], ["trips"]),
        helper.make_node("Loop", ["trips", "", "start"], ["all"], body=body),
        helper.make_node("ConcatFromSequence", ["all"], ["y"], axis=0, new_axis=1),
    ]
    constants = {
        "weight": weight,
        "table": table,
        "seed": np.zeros(16, np.float32),
        "width": np.array([16]),
        "skipped": np.array(1),
    }
    model = graph(
        nodes, {"ids": (TensorProto.INT64, ["n"])}, {"y": (TensorProto.FLOAT, ["m", 16])}, constants
    )
    quantize(model, "fp16", provider=CUDA)
    ids = np.array([4, 5, 6])
    (found,) = run(model, ids=ids)
    expected = np.zeros((4, 16))
    expected[[1, 3]] = table[[4, 6]] @ weight
    close(found, expected, 3e-3)


def test_caches_are_float16_on_both_sides():
    floats = TensorProto.FLOAT
    past, present = "past_key_values.0.key", "present.0.key"
    nodes = [
        helper.make_node("MatMul", ["x", "weight"], ["new"]),
        helper.make_node("Concat", [past, "new"], [present], axis=0),
        helper.make_node("ReduceSum", [present, "axis"], ["y"]),
    ]
    model = graph(
        nodes,
        {"x": (floats, ["n", 32]), past: (floats, ["past", 32])},
        {"y": (floats, None), present: (floats, ["past + n", 32])},
        {"weight": random(32, 32), "axis": np.array([0])},
    )
    quantize(model, "fp16", provider=CUDA)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    assert types == {"x": FLOAT, "y": FLOAT, past: HALF, present: HALF}
    x, cache = random(2, 32, seed=1), random(3, 32, seed=2).astype(np.float16)
    total, grown = run(model, **{"x": x, past: cache})
    assert grown.dtype == np.float16
    close(grown.astype(np.float64), np.concatenate([cache, x @ random(32, 32)]).astype(np.float64), 2e-3)
    close(total.astype(np.float64), grown.astype(np.float64).sum(0, keepdims=True), 2e-3)


def test_a_graph_without_float32_weights_is_refused():
    model = graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        {"x": (TensorProto.FLOAT, ["n"])},
        {"y": (TensorProto.FLOAT, ["n"])},
        {},
    )
    with pytest.raises(ValueError, match="'small' has no float32 weight"):
        quantize(model, "fp16", provider=CUDA)
    assert operators(model) == ["Relu"]
