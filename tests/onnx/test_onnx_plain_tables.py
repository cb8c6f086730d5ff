"""Quantized tables in standard operators give what GatherBlockQuantized gives, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

from fastattn.onnx.quantization import without_block_gathers  # noqa: E402

ROWS = 11


def table(bits: int, width: int, block: int, zero_points: bool, shared: bool) -> tuple[bytes, int]:
    """A graph indices -> rows, and the number of a row's values."""
    generator = np.random.default_rng(0)
    count = -(-width // block)
    stored = (count * block if shared else width) * bits // 8
    arrays = {
        "data": generator.integers(0, 256, (ROWS, stored)).astype(np.uint8),
        "scales": generator.standard_normal((ROWS, count)).astype(np.float32),
    }
    if zero_points:
        packed = -(-count * bits // 8)
        arrays["zeros"] = generator.integers(0, 256, (ROWS, packed)).astype(np.uint8)
    nodes = []
    if shared:
        # As MatMulNBits stores it.
        arrays["blocks"] = arrays.pop("data").reshape(ROWS, count, -1)
        arrays["flat"] = np.array([-1, stored])
        nodes.append(onnx.helper.make_node("Reshape", ["blocks", "flat"], ["data"]))
    inputs = ["data", "indices", "scales", *(["zeros"] if zero_points else [])]
    options = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    nodes.append(
        onnx.helper.make_node(
            "GatherBlockQuantized", inputs, ["rows"], domain="com.microsoft", name="g", **options
        )
    )
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "table",
        [tensor("indices", onnx.TensorProto.INT64, ["batch", "sequence"])],
        [tensor("rows", onnx.TensorProto.FLOAT, ["batch", "sequence", stored * 8 // bits])],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return model.SerializeToString(), stored * 8 // bits


@pytest.mark.parametrize(
    ("bits", "width", "block", "zero_points", "shared"),
    [
        (8, 48, 64, False, False),  # a row shorter than its one block
        (8, 64, 64, False, False),
        (8, 128, 32, False, True),
        (4, 96, 32, False, True),
        (4, 96, 32, True, True),  # three blocks: half a byte of zero points is left over
        (4, 128, 64, True, True),
    ],
)
def test_rows_are_the_same(bits, width, block, zero_points, shared):
    content, stored = table(bits, width, block, zero_points, shared)
    model = ir.from_proto(onnx.load_from_string(content))
    assert without_block_gathers(model) == 1
    indices = np.random.default_rng(1).integers(0, ROWS, (3, 5))
    found = []
    for each in (content, ir.to_proto(model).SerializeToString()):
        session = onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"indices": indices})[0])
    assert found[0].shape == (3, 5, stored)
    np.testing.assert_array_equal(found[1], found[0])
    assert not [node for node in model.graph if node.op_type == "GatherBlockQuantized"]
