"""ONNX subgraphs of norms, softmax, gated activation and rotary embedding, at other shapes."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from exported_cases import Exported, assert_close, in_float64

WIDTH, HEADS, KEY_HEADS, DIM, PART = 12, 4, 2, 8, 6


def norm(operation, *names, **arguments):
    """A call of a norm with a weight and bias; a None among the names stands for itself."""

    def call(x):
        return operation(*(None if name is None else x[name] for name in names), eps=1e-5, **arguments)

    return call


def rotated(cos, interleaved=False):
    return lambda x: ops.rotary(x["query"], x["key"], x[cos], x[cos.replace("cos", "sin")], interleaved)


CASES = {
    "layer_norm": norm(ops.layer_norm, "x", "weight", "bias"),
    "layer_norm without weight": norm(ops.layer_norm, "x", None, None),
    "layer_norm without weight, with bias": norm(ops.layer_norm, "x", None, "bias"),
    "rms_norm": norm(ops.rms_norm, "x", "weight"),
    "rms_norm without weight": norm(ops.rms_norm, "x", None),
    "rms_norm of weights about zero": norm(ops.rms_norm, "x", "weight", offset=1.0),
    "add_rms_norm": norm(ops.add_rms_norm, "x", "residual", "weight"),
    "add_rms_norm of weights about zero": norm(ops.add_rms_norm, "x", "residual", "weight", offset=1.0),
    "softmax": lambda x: ops.softmax(x["x"]),
    "softmax, scaled": lambda x: ops.softmax(x["x"], scale=0.3),
    "softmax under a mask": lambda x: ops.softmax(x["x"], x["mask"]),
    "softmax of hidden NaN and seen -inf": lambda x: ops.softmax(x["broken"], x["mask"], 2.0),
    "softmax, causal": lambda x: ops.softmax(x["scores"], causal=True),
    "softmax, causal under a mask": lambda x: ops.softmax(x["scores"], x["row_mask"], 0.5, True),
    "silu": lambda x: ops.gated_activation(x["x"], x["residual"]),
    "gelu": lambda x: ops.gated_activation(x["x"], x["residual"], "gelu"),
    "gelu, tanh": lambda x: ops.gated_activation(x["x"], x["residual"], "gelu_tanh"),
    "rotary": rotated("cos"),
    "rotary, partial": rotated("cos_part"),
    "rotary of each row's own positions": rotated("cos_rows"),
    "rotary of one row's positions": rotated("cos_row"),
    "rotary, interleaved": rotated("cos_pairs", True),
    "rotary, interleaved, partial, of each row's own positions": rotated("cos_rows_pairs", True),
}


def angles(*shape, pairs=False):
    """cos and sin of random angles, repeated as models repeat them."""
    each = torch.rand(*shape[:-1], shape[-1] // 2) * 6
    whole = each.repeat_interleave(2, -1) if pairs else torch.cat([each, each], -1)
    return whole.cos(), whole.sin()


def inputs_of(batch, length, columns):
    mask = torch.rand(batch, length, WIDTH) > 0.4
    mask[0, 0] = False
    broken = torch.randn(batch, length, WIDTH).masked_fill(~mask, torch.nan)
    broken[batch - 1, length - 1] = -torch.inf
    tables = {
        "": angles(length, DIM),
        "_part": angles(length, PART),
        "_rows": angles(batch, length, DIM),
        "_row": angles(1, length, DIM),
        "_pairs": angles(length, DIM, pairs=True),
        "_rows_pairs": angles(batch, length, PART, pairs=True),
    }
    return {
        "x": torch.randn(batch, length, WIDTH),
        "residual": torch.randn(batch, length, WIDTH),
        "weight": torch.randn(WIDTH),
        "bias": torch.randn(WIDTH),
        "mask": mask,
        "broken": broken,
        "scores": torch.randn(batch, length, columns),
        "row_mask": torch.rand(batch, 1, columns) > 0.4,
        "query": torch.randn(batch, length, HEADS, DIM).transpose(1, 2),
        "key": torch.randn(batch, KEY_HEADS, length, DIM),
        **{f"cos{name}": cos for name, (cos, _) in tables.items()},
        **{f"sin{name}": sin for name, (_, sin) in tables.items()},
    }


@functools.cache
def export(target):
    inputs = inputs_of(3, 5, 7)
    dynamic = {
        name: {i: "dynamic" for i, size in enumerate(x.shape) if size in (3, 5, 7)}
        for name, x in inputs.items()
    }
    return Exported(CASES, inputs, dynamic, target)


@pytest.fixture(scope="module", params=["cpu", "standard"])
def exported(request):
    return export(request.param)


@pytest.fixture(scope="module", params=[(3, 5, 7), (1, 2, 2), (6, 9, 4)], ids=str)
def results(request, exported):
    torch.manual_seed(1)
    inputs = inputs_of(*request.param)
    return request.param, inputs, exported.run(inputs)


@pytest.mark.parametrize("name", CASES)
def test_pointwise(name, results):
    shape, inputs, found = results
    exact, own = CASES[name](in_float64(inputs)), CASES[name](inputs)
    exact, own = (x if isinstance(x, tuple) else (x,) for x in (exact, own))
    for got, mine, wanted in zip(found[name], own, exact, strict=True):
        assert_close(got, mine, wanted, (name, shape))


def test_onnx_runtime_finds_the_patterns(tmp_path):
    """The file holds standard operators only; each pattern is one operator once it is loaded."""
    import onnx
    import onnx_ir
    import onnxruntime

    cases = {
        "rms_norm": norm(ops.rms_norm, "x", "weight"),
        "rms_norm of weights about zero": norm(ops.rms_norm, "residual", "weight", offset=1.0),
        "add_rms_norm": norm(ops.add_rms_norm, "x", "residual", "weight"),
        "silu": lambda x: ops.gated_activation(x["x"], x["residual"]),
    }
    inputs = {name: x for name, x in inputs_of(3, 5, 7).items() if name in ("x", "residual", "weight")}
    model = Exported(cases, inputs, {"x": {0: "batch"}, "residual": {0: "batch"}, "weight": {}}).model
    written = Counter(node.op_type for node in model.graph)
    assert written["ReduceMean"] == 3 and written["Sum"] == 1 and written["Cast"] == 0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the written file is for this machine
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    content = onnx_ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    loaded = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
    assert loaded["SimplifiedLayerNormalization"] == 3
    assert loaded["SkipSimplifiedLayerNormalization"] == 0, "slower on the CPU"
    assert loaded["QuickGelu"] == 1, "x * sigmoid(x)"


QUANTIZED = {
    f"{name}, {dtype}": (name, dtype)
    for name in ("add_layer_norm", "add_rms_norm")
    for dtype in ("int8", "fp8")
}


def quantized(name, dtype, x):
    weights = (x["weight"], x["bias"]) if name == "add_layer_norm" else (x["weight"],)
    rows, scales, total = getattr(ops, name)(x["x"], x["residual"], *weights, 1e-5, quantize=dtype)
    # numpy has no float8.
    return rows.float() if dtype == "fp8" else rows, scales, total


@pytest.fixture(scope="module")
def quantizing():
    cases = {
        case: (lambda x, name=name, dtype=dtype: quantized(name, dtype, x))
        for case, (name, dtype) in QUANTIZED.items()
    }
    inputs = {
        name: x for name, x in inputs_of(3, 5, 7).items() if name in ("x", "residual", "weight", "bias")
    }
    dynamic = {name: {0: "batch", 1: "length"} if x.dim() == 3 else {} for name, x in inputs.items()}
    return Exported(cases, inputs, dynamic)


@pytest.mark.parametrize("case", QUANTIZED)
@pytest.mark.parametrize("size", [(3, 5), (1, 2), (6, 9)], ids=str)
def test_quantized_rows(case, size, quantizing):
    """A row of zeros and one with a NaN among them; elsewhere within half a step of the norm itself."""
    name, dtype = QUANTIZED[case]
    batch, length = size
    inputs = {
        "x": torch.randn(batch, length, WIDTH),
        "residual": torch.randn(batch, length, WIDTH),
        "weight": torch.randn(WIDTH),
        "bias": torch.zeros(WIDTH),
    }
    inputs["x"][0, 0], inputs["residual"][0, 0] = 0.0, 0.0
    inputs["x"][-1, -1, 0] = torch.nan
    rows, scales, total = quantizing.run(inputs)[case]
    expected_rows, expected_scales, expected_total = quantized(name, dtype, inputs)
    assert rows.dtype == expected_rows.dtype
    torch.testing.assert_close(total, expected_total, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(scales, expected_scales, rtol=1e-5, atol=0, equal_nan=True)
    assert scales[0, 0] == 1.0 and scales[-1, -1].isnan()
    weights = (inputs["weight"], inputs["bias"]) if name == "add_layer_norm" else (inputs["weight"],)
    norm = getattr(ops, name.removeprefix("add_"))(expected_total, *weights, 1e-5)
    real = torch.ones(batch, length, dtype=torch.bool)
    real[-1, -1] = False
    error = (rows.float() * scales - norm)[real].abs()
    # int8 has steps of one scale; float8_e4m3 three bits of fraction, and steps of 2 ** -9 near zero.
    step = scales if dtype == "int8" else torch.maximum(norm.abs() / 8, scales * 2**-9)
    assert (error <= step.expand_as(norm)[real] * 0.5001).all()
