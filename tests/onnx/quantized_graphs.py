"""Graphs small enough to check every number of, and what their quantized forms must compute, in float64."""

from __future__ import annotations

import io

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


def graph(nodes, inputs, outputs, constants, opset=20):
    """An `onnx_ir.Model`; inputs and outputs: name -> (TensorProto type, dimensions)."""
    proto = helper.make_model(
        helper.make_graph(
            nodes,
            "small",
            [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()],
            [helper.make_tensor_value_info(name, *info) for name, info in outputs.items()],
            [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )
    return ir.from_proto(proto)


def linear(weight, bias=None, op_type="Gemm", **attributes):
    """y = x @ weight.T + bias, as PyTorch stores it; a MatMul takes weight.T and x [batch, rows, K]."""
    outputs, inputs = weight.shape
    constants = {"weight": weight if op_type == "Gemm" else np.ascontiguousarray(weight.T)}
    names = ["x", "weight"]
    if bias is not None:
        constants["bias"] = bias
        names.append("bias")
    if op_type == "Gemm":
        attributes = {"transB": 1, **attributes}
    leading = ["rows"] if op_type == "Gemm" else ["batch", "rows"]
    node = helper.make_node(op_type, names, ["y"], **attributes)
    return graph(
        [node],
        {"x": (TensorProto.FLOAT, [*leading, inputs])},
        {"y": (TensorProto.FLOAT, [*leading, outputs])},
        constants,
    )


def run(model, **inputs):
    """All outputs of an `onnx_ir.Model` in ONNX Runtime."""
    buffer = io.BytesIO()
    onnx.save(ir.to_proto(model), buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=[CPU])
    return session.run(None, inputs)


def operators(model):
    return [node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)]


def stored(model, ending):
    """The only constant whose name ends so, as an array."""
    (found,) = [v for name, v in model.graph.initializers.items() if name.endswith(ending)]
    return found.const_value.numpy()


def quantized_activations(x):
    """What uint8 levels of `x` in its own range stand for, by ONNX's DynamicQuantizeLinear; float64."""
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    scale = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
    if scale == 0:
        return np.zeros(x.shape)
    zero = np.clip(np.rint(np.float32(0 - low) / scale), 0, 255)
    levels = np.clip(np.rint(x / scale) + zero, 0, 255)
    return (levels - zero).astype(np.float64) * np.float64(scale)


def rounded_rows(weight, levels=127):
    """float64 values of weights rounded to -levels..levels with a scale a row."""
    scale = np.abs(weight).max(1, keepdims=True) / np.float32(levels)
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.clip(np.rint(weight / scale), -levels, levels).astype(np.float64) * scale


def close(found, expected, relative=2e-6):
    """To a few roundings of the expected scale."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    scale = np.abs(expected).max(initial=0.0)
    error = np.abs(found - expected).max(initial=0.0)
    assert error <= relative * max(scale, 1e-30), f"error {error:.3e} of {scale:.3e}, shape {found.shape}"


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
