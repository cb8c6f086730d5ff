"""int8 products and embedding tables of a graph: what is stored, what is computed, what is left and why."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir as ir
from onnx import TensorProto, helper
from quantized_graphs import (
    CPU,
    CUDA,
    close,
    graph,
    linear,
    operators,
    quantized_activations,
    random,
    rounded_rows,
    run,
    stored,
)

from fastattn.onnx.quantization import quantize


def counted(decisions, what, how):
    return sum(each["count"] for each in decisions if each["what"] == what and how in each["how"])


@pytest.mark.parametrize("inputs, outputs", [(64, 48), (37, 19), (1, 16), (130, 257)])
@pytest.mark.parametrize("rows", [1, 7, 0])
def test_dynamic_products_compute_what_the_stored_numbers_say(inputs, outputs, rows):
    weight, bias, x = random(outputs, inputs), random(outputs, seed=1), random(rows, inputs, seed=2)
    model = linear(weight, bias)
    decisions = quantize(model, "int8", provider=CPU, reduce_range=False)
    assert stored(model, "_int8").dtype == np.int8
    (found,) = run(model, x=x)
    if rows == 0:
        assert found.shape == (0, outputs)
        return
    close(found, quantized_activations(x) @ rounded_rows(weight).T + bias, 1e-5)
    assert counted(decisions, "products", "int8") == 1
    assert json.loads(json.dumps(decisions)) == decisions


@pytest.mark.parametrize("op_type", ["Gemm", "MatMul"])
def test_products_without_bias_in_either_form(op_type):
    weight = random(32, 24)
    x = random(5, 24) if op_type == "Gemm" else random(2, 5, 24)
    model = linear(weight, op_type=op_type)
    quantize(model, "int8", provider=CPU, reduce_range=False)
    close(run(model, x=x)[0], quantized_activations(x) @ rounded_rows(weight).T, 1e-5)


def test_factor_of_a_gemm_goes_into_the_weight_and_a_bias_row_into_the_product():
    weight, bias, x = random(32, 24), random(1, 32, seed=1), random(5, 24, seed=2)
    model = linear(weight, bias, alpha=0.5)
    quantize(model, "int8", provider=CPU, reduce_range=False)
    close(run(model, x=x)[0], quantized_activations(x) @ rounded_rows(0.5 * weight).T + bias, 1e-5)


def test_seven_bit_weights():
    weight, x = random(32, 24), random(5, 24, seed=2)
    model = linear(weight)
    (decision,) = quantize(model, "int8", provider=CPU, reduce_range=True)
    assert np.abs(stored(model, "_int8").astype(int)).max() == 63
    assert "7-bit" in decision["why"]
    close(run(model, x=x)[0], quantized_activations(x) @ rounded_rows(weight, 63).T, 1e-5)


@pytest.mark.parametrize(
    "flags, reduced", [({"avx2"}, True), ({"avx2", "avx512_vnni"}, False), (set(), False)]
)
def test_seven_bits_only_where_vnni_is_missing(flags, reduced, monkeypatch):
    monkeypatch.setattr("fastattn.onnx.quantization.processor.cpu_flags", lambda: frozenset(flags))
    model = linear(random(32, 24))
    (decision,) = quantize(model, "int8", provider=CPU)
    assert np.abs(stored(model, "_int8").astype(int)).max() == (63 if reduced else 127)
    assert ("7-bit" in decision["why"]) == reduced


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4-weight"])
@pytest.mark.parametrize("kind", ["zero rows", "constant columns", "huge", "tiny"])
def test_awkward_weights_stay_finite_and_near(precision, kind):
    weight, x = random(32, 40), random(5, 40, seed=2)
    if kind == "zero rows":
        weight[::3] = 0
    elif kind == "constant columns":
        weight[:, :] = weight[:, :1]
    elif kind == "huge":
        weight *= np.float32(1e30)
    else:
        weight *= np.float32(1e-38)
    model = linear(weight)
    quantize(model, precision, provider=CPU)
    (found,) = run(model, x=x)
    expected = x.astype(np.float64) @ weight.T.astype(np.float64)
    assert np.isfinite(found).all()
    tolerance = 0.25 if precision == "int4-weight" else 0.03
    # What has no float32 scale of its own may become zero.
    assert np.abs(found - expected).max() <= max(tolerance * np.abs(expected).max(), 1e-35)
    if kind == "zero rows":
        assert np.abs(found[:, ::3]).max() == 0


def test_products_of_one_activation_share_its_quantization_and_of_one_weight_its_storage():
    weights = {f"w{i}": random(24, 24, seed=i) for i in range(3)}
    nodes = [helper.make_node("Gemm", ["x", f"w{i}"], [f"y{i}"], transB=1) for i in range(3)]
    nodes.append(helper.make_node("Gemm", ["y0", "w0"], ["y3"], transB=1))
    outputs = {f"y{i}": (TensorProto.FLOAT, ["rows", 24]) for i in range(4)}
    model = graph(nodes, {"x": (TensorProto.FLOAT, ["rows", 24])}, outputs, weights)
    decisions = quantize(model, "int8", provider=CPU)
    assert operators(model).count("DynamicQuantizeLinear") == 2
    assert len([v for v in model.graph.initializers.values() if v.dtype == ir.DataType.INT8]) == 3
    assert not [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and len(v.shape) > 1
    ]
    assert counted(decisions, "products", "int8") == 4
    x = random(5, 24, seed=9)
    found = run(model, x=x)
    close(found[2], quantized_activations(x) @ rounded_rows(weights["w2"]).T, 1e-5)
    close(found[3], quantized_activations(found[0]) @ rounded_rows(weights["w0"]).T, 1e-5)


def test_what_is_left_is_counted_with_its_reason():
    constants = {
        "w": random(24, 24),
        "labels": random(3, 24),
        "batched": random(2, 24, 24),
        "first": random(5, 4),
        "small": random(4, 24),
        "fed": random(24, 24),
        "ids": np.array([0, 1, 2, 3], np.int64),
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["a"], transB=1),
        helper.make_node("Gemm", ["a", "labels"], ["b"], transB=1),
        helper.make_node("MatMul", ["a", "batched"], ["c"]),
        helper.make_node("MatMul", ["first", "x"], ["d"]),
        helper.make_node("Gather", ["small", "ids"], ["e"]),
        helper.make_node("Gemm", ["e", "a"], ["f"], transB=1),
        helper.make_node("Gemm", ["e", "fed"], ["g"], transB=1),
        helper.make_node("Gemm", ["a", "w"], ["h"], transA=1),
    ]
    outputs = {name: (TensorProto.FLOAT, None) for name in "bcdfgh"}
    rows = {"x": (TensorProto.FLOAT, [4, 24]), "fed": (TensorProto.FLOAT, [24, 24])}
    model = graph(nodes, rows, outputs, constants)
    before = operators(model)
    decisions = quantize(model, "int8", provider=CPU)
    held = (
        len([op for op in before if op in ("Gemm", "MatMul")]) - 2
    )  # f: activations alone; g: fed by callers
    assert sum(d["count"] for d in decisions if d["what"] in ("product", "products")) == held
    left = {(d["what"], d["count"]) for d in decisions if d["how"] == "left in float32"}
    assert left == {("product", 1), ("embedding table", 1)}
    assert all(d["why"] for d in decisions)
    assert operators(model).count("MatMulIntegerToFloat") == 1


@pytest.mark.parametrize("width", [384, 60, 512, 33])
def test_embedding_tables_have_int8_rows(width):
    table, weight = random(700, width), random(24, width, seed=1)
    model = graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("MatMul", ["rows", "weight"], ["y"]),
        ],
        {"ids": (TensorProto.INT64, ["batch", "sequence"])},
        {"rows": (TensorProto.FLOAT, ["batch", "sequence", width]), "y": (TensorProto.FLOAT, None)},
        {"table": table, "weight": np.ascontiguousarray(weight.T)},
    )
    decisions = quantize(model, "int8", provider=CPU)
    assert counted(decisions, "embedding tables", "8-bit") == 1
    ids = np.array([[0, 699, 5], [17, 17, 1]])
    found = run(model, ids=ids)[0]
    assert found.shape == (2, 3, width)
    step = np.abs(table[ids]).max(-1, keepdims=True) / 127
    assert (np.abs(found - table[ids]) <= 0.5001 * step).all()
    assert run(model, ids=np.zeros((0, 4), np.int64))[0].shape == (0, 4, width)


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4-weight"])
@pytest.mark.parametrize("width", [256, 60])
def test_a_head_tied_to_the_embedding_is_stored_once(precision, width):
    table = random(700, width)
    model = graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("Gemm", ["rows", "table"], ["logits"], transB=1),
        ],
        {"ids": (TensorProto.INT64, ["tokens"])},
        {"rows": (TensorProto.FLOAT, ["tokens", width]), "logits": (TensorProto.FLOAT, ["tokens", 700])},
        {"table": table},
    )
    quantize(model, precision, provider=CPU)
    data = [
        v for v in model.graph.initializers.values() if v.dtype == ir.DataType.UINT8 and len(v.shape) == 3
    ]
    assert len(data) == 1
    rows, logits = run(model, ids=np.array([0, 699, 5]))
    bits = 4 if precision == "int4-weight" else 8
    # Four bits: half a step of 1/15 of the range, and what the range leaves out to lessen the whole error.
    close(rows, table[[0, 699, 5]].astype(np.float64), 0.15 if bits == 4 else 0.005)
    close(logits, rows.astype(np.float64) @ table.T, 0.1 if bits == 4 else 0.02)


@pytest.mark.parametrize("calibrated", [False, True])
def test_standard_operators_alone(calibrated):
    table, weight, bias = random(700, 60), random(60, 60, seed=1), random(60, seed=2)
    model = graph(
        [
            helper.make_node("Gather", ["table", "ids"], ["rows"], axis=0),
            helper.make_node("Gemm", ["rows", "weight", "bias"], ["hidden"], transB=1),
            helper.make_node("Gemm", ["hidden", "table"], ["logits"], transB=1),
        ],
        {"ids": (TensorProto.INT64, ["tokens"])},
        {"rows": (TensorProto.FLOAT, ["tokens", 60]), "logits": (TensorProto.FLOAT, ["tokens", 700])},
        {"table": table, "weight": weight, "bias": bias},
    )
    del model.opset_imports["com.microsoft"]
    ids = np.array([0, 699, 5])
    batches = [{"ids": ids}] if calibrated else None
    decisions = quantize(model, "int8", provider=CPU, calibration=batches, contrib=False, reduce_range=False)
    assert {node.domain for node in ir.traversal.RecursiveGraphIterator(model.graph)} == {""}
    assert set(model.opset_imports) == {""}
    assert counted(decisions, "products", "int8") == 2
    assert counted(decisions, "embedding tables", "8-bit") == 1
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    rows, logits = run(model, ids=ids)
    assert (np.abs(rows - table[ids]) <= 0.5001 * np.abs(table[ids]).max(-1, keepdims=True) / 127).all()
    close(logits, (rows.astype(np.float64) @ weight.T + bias) @ table.T, 0.03)


def test_products_in_subgraphs():
    w, v = random(24, 24), random(24, 24, seed=1)
    floats = helper.make_tensor_value_info
    taken = helper.make_graph(
        [
            helper.make_node("Gemm", ["rows", "w"], ["first"], transB=1),
            helper.make_node("Gemm", ["first", "v"], ["inner"], transB=1),
        ],
        "then",
        [],
        [floats("inner", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Gemm", ["rows", "v"], ["outer"], transB=1)],
        "else",
        [],
        [floats("outer", TensorProto.FLOAT, None)],
    )

    def make():
        return graph(
            [helper.make_node("If", ["flag"], ["y"], then_branch=taken, else_branch=other)],
            {"rows": (TensorProto.FLOAT, ["rows_", 24]), "flag": (TensorProto.BOOL, [])},
            {"y": (TensorProto.FLOAT, None)},
            {"w": w, "v": v},
        )

    x = random(3, 24, seed=4)
    first = quantized_activations(x) @ rounded_rows(w).T
    wanted = {
        True: quantized_activations(first.astype(np.float32)) @ rounded_rows(v).T,
        False: quantized_activations(x) @ rounded_rows(v).T,
    }
    model, calibrated = make(), make()
    assert counted(quantize(model, "int8", provider=CPU), "products", "each call's range") == 3
    batches = [{"rows": x, "flag": np.array(True)}]
    decisions = quantize(calibrated, "int8", provider=CPU, calibration=batches)
    assert counted(decisions, "products", "measured ranges") == 2, "what lies in a branch cannot be measured"
    assert counted(decisions, "products", "each call's range") == 1
    for flag, expected in wanted.items():
        close(run(model, rows=x, flag=np.array(flag))[0], expected, 0.005)
        close(run(calibrated, rows=x, flag=np.array(flag))[0], expected, 0.005)


def test_weights_in_files_and_models_saved_beside_them(tmp_path):
    weight = random(64, 48)
    ir.save(linear(weight), tmp_path / "fp32.onnx", external_data="fp32.data")
    model = ir.load(tmp_path / "fp32.onnx")
    quantize(model, "int8", provider=CPU, reduce_range=False)
    assert np.array_equal(stored(model, "_int8"), np.rint(weight / (np.abs(weight).max(1) / 127)[:, None]).T)


REFUSED = {
    "int3": (dict(precision="int3"), "unknown precision 'int3'"),
    "int8 on a GPU": (dict(precision="int8", provider=CUDA), "CPUExecutionProvider"),
    "fp16 on a CPU": (dict(precision="fp16"), "CUDAExecutionProvider"),
    "calibrated blocks": (dict(precision="int8-weight", calibration=[]), "calibration is for 'int8'"),
    "blocks of 7 bits": (dict(precision="int4-weight", reduce_range=True), "reduce_range is for 'int8'"),
    "blocks in standard operators": (
        dict(precision="int8-weight", contrib=False),
        "ONNX Runtime's own operators",
    ),
    "no batches": (dict(precision="int8", calibration=[]), "no batches"),
    "another input": (dict(precision="int8", calibration=[{"z": random(2, 24)}]), r"\['z'\].*\['x'\]"),
    "another type": (dict(precision="int8", calibration=[{"x": np.zeros((2, 24))}]), "float64"),
    "another size": (dict(precision="int8", calibration=[{"x": random(2, 23)}]), r"\[2, 23\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    arguments, message = REFUSED[name]
    model = linear(random(32, 24))
    with pytest.raises(ValueError, match=message):
        quantize(model, **{"provider": CPU, **arguments})
    assert operators(model) == ["Gemm"], "a refused graph stays as it was"
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_nothing_to_quantize_and_weights_that_are_no_numbers():
    with pytest.raises(ValueError, match=r"'small' has no matrix product.*1 product: a head of fewer"):
        quantize(linear(random(3, 24)), "int8", provider=CPU)
    weight = random(32, 24)
    weight[3, 3] = np.nan
    with pytest.raises(ValueError, match=r"weight.*\[32, 24\].*not finite"):
        quantize(linear(weight), "int8", provider=CPU)
