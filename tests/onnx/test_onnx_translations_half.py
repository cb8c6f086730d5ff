"""ONNX subgraphs of float16 tensors: computed in float32 wherever the operation is, and rounded once."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from exported_cases import Exported, in_float64

HEADS, DIM, WIDTH = 4, 8, 12


def attend(**arguments):
    return lambda x: ops.attention(x["query"], x["key"], x["key"], **{k: f(x) for k, f in arguments.items()})


def packed(**arguments):
    def call(x):
        bounds = x["bounds"]
        named = {name: make(x) for name, make in arguments.items()}
        return ops.varlen_attention(x["packed"], x["packed"], x["packed"], bounds, bounds, 9, 9, **named)

    return call


def relative_bias(x):
    return ops.RelativeBias(x["table"], "t5", 20)


CASES = {
    "fused attention": attend(),
    "fused attention under a mask": attend(mask=lambda x: x["mask"]),
    "fused attention with relative bias": attend(relative_bias=relative_bias),
    "attention in a window": attend(window=lambda x: (1, 1)),
    "attention with sinks": attend(sinks=lambda x: x["sinks"], softcap=lambda x: 2.0),
    "packed attention": packed(),
    "packed attention with relative bias": packed(relative_bias=relative_bias),
    "causal packed attention": packed(causal=lambda x: True),
    "decode attention": lambda x: ops.decode_attention(x["query"], x["key"], x["key"], x["lengths"]),
    "layer_norm": lambda x: ops.layer_norm(x["x"], x["weight"], None, 1e-5),
    "add_layer_norm": lambda x: ops.add_layer_norm(x["x"], x["x"], x["weight"], None, 1e-5),
    "rms_norm": lambda x: ops.rms_norm(x["x"], x["weight"], 1e-5, offset=1.0),
    "add_rms_norm": lambda x: ops.add_rms_norm(x["x"], x["x"], x["weight"], 1e-5),
    "softmax": lambda x: ops.softmax(x["x"], scale=0.5, causal=True),
    "rotary": lambda x: ops.rotary(x["query"], x["query"], x["angles"].cos(), x["angles"].sin()),
}


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(0)
    floats = {
        "query": torch.randn(2, HEADS, 5, DIM),
        "key": torch.randn(2, HEADS, 7, DIM),
        "packed": torch.randn(6, HEADS, DIM),
        "table": torch.randn(8, HEADS),
        "sinks": torch.randn(HEADS),
        "x": torch.randn(3, 5, WIDTH),
        "weight": torch.randn(WIDTH),
        "angles": torch.rand(5, DIM // 2).repeat(1, 2),
    }
    return {name: x.half() for name, x in floats.items()} | {
        "mask": torch.tensor([[True] * 3 + [False] * 4, [False] * 7]),
        "bounds": torch.tensor([0, 2, 6], dtype=torch.int32),
        "lengths": torch.tensor([9, 3]).clamp(max=7),
    }


@pytest.fixture(scope="module", params=["cpu", "standard", "cuda"])
def results(request, inputs):
    return Exported(CASES, inputs, {name: {} for name in inputs}, request.param).run(inputs)


@pytest.mark.parametrize("name", CASES)
def test_float16(name, inputs, results):
    exact = CASES[name](in_float64(inputs))
    for found, wanted in zip(results[name], exact if isinstance(exact, tuple) else (exact,), strict=True):
        assert found.dtype == torch.float16 and found.shape == wanted.shape
        error = (found - wanted).abs().max()
        assert error <= 2 * torch.finfo(torch.float16).eps * wanted.abs().max(), (error, name)


def test_rotary_of_float64_is_refused():
    """ONNX Runtime's operator for it computes in float32."""
    query, angles = torch.randn(1, 2, 3, DIM).double(), torch.rand(3, DIM)
    inputs = {"query": query, "angles": angles}
    with pytest.raises(ValueError, match="convert the model to float32"):
        Exported(
            {"rotary": lambda x: ops.rotary(x["query"], x["query"], x["angles"], x["angles"])},
            inputs,
            {name: {} for name in inputs},
        )
