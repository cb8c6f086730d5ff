"""`ops.quantized_linear` against float64, on this processor and as those with fewer instructions run it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tolerance import assert_close
from torch.nn.functional import gelu, linear, relu, silu

from fastattn import ops
from fastattn.ops import quantized_linear_cpu
from fastattn.ops.norm_reference import quantize_rows
from fastattn.ops.packed_weight import SCHEMES
from fastattn.ops.quantized_linear_cpu import Instructions, choose
from fastattn.ops.quantized_linear_reference import quantized_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    None: lambda x: x,
    "gelu": gelu,
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "relu": relu,
    "silu": silu,
}
# Every instruction set there is: x86 without VNNI, with it alone, with AMX.
MACHINES = {
    "this one": None,
    "none": Instructions(int8=False, bfloat16=False, int4_tiles=False),
    "bfloat16": Instructions(int8=False, bfloat16=True, int4_tiles=False),
}
# Empty, a decoded token, odd sizes, a K that no group divides, one element, tiles.
SHAPES = [(0, 64, 64), (1, 64, 128), (3, 33, 17), (70, 200, 130), (1, 1, 1), (100, 128, 64)]


@pytest.fixture(params=MACHINES)
def machine(request, monkeypatch):
    if MACHINES[request.param] is not None:
        monkeypatch.setattr(quantized_linear_cpu, "instructions", lambda: MACHINES[request.param])
    return request.param


def exact(x, packed):
    """The product in float64, with x rounded where the scheme rounds it."""
    rows = x if x.dtype == torch.float64 else x.float()
    if packed.input_scales is not None:
        rows = rows / packed.input_scales
    if packed.scheme in ("int8", "fp8"):
        numbers, scales = quantize_rows(rows, packed.scheme)
        rows = numbers.double() * scales.double()
    return rows.double() @ packed.stored_weight(torch.float64).T


def packed_of(scheme, columns, rows, prepared=False, input_scales=False):
    weight = torch.randn(rows, columns) / columns**0.5
    packed = ops.quantize_absmax(weight, scheme, 32 if scheme == "int4-weight" else None)
    if scheme == "int4-weight":
        # As HQQ leaves them.
        packed = replace(packed, zero_points=packed.zero_points + torch.randn_like(packed.zero_points))
    if input_scales:
        packed = replace(packed, input_scales=torch.rand(columns) + 0.5)
    return ops.prepare(packed) if prepared else packed


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(machine, scheme, dtype, shape):
    rows, columns, outputs = shape
    for prepared, input_scales in ((False, False), (True, True)):
        packed = packed_of(scheme, columns, outputs, prepared, input_scales)
        x, bias = torch.randn(rows, columns).to(dtype), torch.randn(outputs)
        found = ops.quantized_linear(x, packed, bias)
        assert found.dtype == dtype and found.is_contiguous()
        own = linear(x, packed.dequantize(dtype), bias.to(dtype))
        float_exact = x.double() @ packed.dequantize(torch.float64).T + bias
        expected = exact(x, packed) + bias
        # PyTorch's own rounding, carried to the expected result.
        assert_close(found, (own.double() - float_exact) + expected, expected, (scheme, packed.layout))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_float64(scheme):
    packed = packed_of(scheme, 70, 33, input_scales=True)
    x = torch.randn(5, 70, dtype=torch.float64)
    found, expected = ops.quantized_linear(x, packed), exact(x, packed)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_int8_sums_are_exact():
    # Whole numbers that the scales leave whole: any rounding, or a sum of 16 bits that overflows, would show.
    x = torch.randint(-127, 128, (40, 512)).float()
    x[:, 0] = 127
    weight = torch.randint(-127, 128, (96, 512)).float()
    weight[:, 1], weight[::2, 2:] = 127, 127
    x[::2, 2:] = 127
    packed = ops.quantize_absmax(weight, "int8")
    assert torch.equal(ops.quantized_linear(x, packed).double(), x.double() @ weight.double().T)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 60])
def test_rows_do_not_mix(machine, scheme, dtype, rows):
    packed = packed_of(scheme, 64, 64, prepared=True)
    bias = torch.randn(64).to(dtype)
    x = torch.randn(rows + 3, 64).to(dtype)
    clean = ops.quantized_linear(x, packed, bias)
    x[0], x[1, 5], x[2, 7] = 0, torch.inf, torch.nan
    found = ops.quantized_linear(x, packed, bias)
    assert torch.equal(found[0], bias)
    assert found[1:3].isnan().all()
    torch.testing.assert_close(found[3:], clean[3:])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_huge_and_tiny_rows(machine, scheme):
    packed = packed_of(scheme, 64, 32)
    x = torch.randn(4, 64) * torch.tensor([1e37, 1e20, 1e-20, 1e-30])[:, None]
    found, expected = ops.quantized_linear(x, packed).double(), exact(x, packed)
    assert ((found - expected).abs() <= 1e-5 * expected.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_leading_dimensions(scheme, activation):
    packed, bias = packed_of(scheme, 32, 24), torch.randn(24)
    # A slice and a transpose: neither is contiguous.
    x = torch.randn(5, 2, 40).transpose(0, 1)[..., 3:35]
    before = x.clone()
    found = ops.quantized_linear(x, packed, bias, activation)
    plain = ops.quantized_linear(x.reshape(10, 32).contiguous(), packed, bias)
    torch.testing.assert_close(found, ACTIVATIONS[activation](plain).view(2, 5, 24))
    assert torch.equal(x, before), "the argument was written to"
    vector = ops.quantized_linear(x[0, 0], packed, bias, activation)
    torch.testing.assert_close(vector, found[0, 0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_reference_means_the_same(scheme):
    packed, x, bias = packed_of(scheme, 96, 40, input_scales=True), torch.randn(7, 96), torch.randn(40)
    found = ops.quantized_linear(x, packed, bias, "silu")
    torch.testing.assert_close(found, quantized_linear_reference(x, packed, bias, "silu"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_the_dequantized_layer(scheme, activation):
    packed = packed_of(scheme, 32, 64, prepared=True, input_scales=True)
    x = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(64, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 64, dtype=torch.float64)
    found = torch.autograd.grad(
        (ops.quantized_linear(x, packed, bias, activation) * weights).sum(), (x, bias)
    )
    # The derivative of the activation where the rounded product is; the product's, that of x itself.
    product = x @ packed.dequantize(torch.float64).T + bias
    rounded = exact(x.detach().flatten(0, 1), packed).view(2, 5, 64) + bias.detach()
    through = product + (rounded - product).detach()
    expected = torch.autograd.grad((ACTIVATIONS[activation](through) * weights).sum(), (x, bias))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_autocast(scheme):
    packed, bias = packed_of(scheme, 64, 64), torch.randn(64, requires_grad=True)
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.quantized_linear(x, packed, bias)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, ops.quantized_linear(x.bfloat16(), packed, bias))
    found.float().sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32
    torch.testing.assert_close(bias.grad, torch.full((64,), 3.0))


def test_only_kernels_that_are_right_are_chosen():
    """The weight-only int8 kernel reads out of bounds at sizes it has no code for; integer sums have 32
    bits.
    """
    fast = Instructions(int8=True, bfloat16=True, int4_tiles=True)
    none = MACHINES["none"]
    for columns, outputs in ((64, 60), (72, 64), (1, 1)):
        packed = packed_of("int8-weight", columns, outputs)
        assert choose(packed, torch.bfloat16, 1, fast).face == "digits"
    # Zeros, expanded: only the shape matters.
    values, scales = torch.zeros((), dtype=torch.int8).expand(1, 1 << 17), torch.ones(1, 1)
    long = ops.PackedWeight(values, scales, "int8", 1 << 17, 1 << 17)
    assert choose(long, torch.float32, 1, fast).face == "dequantize"
    tiles = packed_of("int4-weight", 64, 64, prepared=True)
    for scheme in SCHEMES:
        packed = tiles if scheme == "int4-weight" else packed_of(scheme, 63, 63)
        assert choose(packed, torch.float32, 1, none).face in ("dequantize", "reference")


@pytest.mark.once
def test_right_where_onednn_has_no_vnni():
    """The processor's flags say VNNI, oneDNN does without: its int8 products overflow and are not used."""
    program = (
        "import torch\n"
        "from fastattn import ops\n"
        "x = torch.full((3, 256), 127.0); weight = torch.full((64, 256), 127.0); weight[::2] = -127\n"
        "found = ops.quantized_linear(x, ops.quantize_absmax(weight, 'int8'))\n"
        "assert torch.equal(found, x @ weight.T), found\n"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PACKED = ops.quantize_absmax(torch.ones(4, 8), "int8")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.quantized_linear(torch.ones(2, 8), torch.ones(4, 8)),
            TypeError,
            "it must be a PackedWei",
        ),
        (lambda: ops.quantized_linear(torch.ones(2, 7), PACKED), ValueError, r"\[..., 8\].*got \[2, 7\]"),
        (lambda: ops.quantized_linear(torch.tensor(1.0), PACKED), ValueError, r"got \[\]"),
        (lambda: ops.quantized_linear(torch.ones(2, 8).int(), PACKED), TypeError, "x is torch.int32"),
        (
            lambda: ops.quantized_linear(torch.ones(2, 8), PACKED, torch.ones(8)),
            ValueError,
            r"\[4\]; got \[8\]",
        ),
        (
            lambda: ops.quantized_linear(torch.ones(2, 8), PACKED, torch.ones(4).int()),
            TypeError,
            "bias torch.i",
        ),
        (
            lambda: ops.quantized_linear(torch.ones(2, 8), PACKED, activation="tanh"),
            ValueError,
            "'tanh'; accepted are None, 'gelu'",
        ),
        (
            lambda: ops.quantized_linear(torch.ones(2, 8), PACKED.to("meta")),
            ValueError,
            "is on meta but x is",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("scheme", ["int8", "int8-weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(0,), (1,), (2, 5), (300,)])
def test_several_layers_of_one_input_are_each_as_on_their_own(machine, scheme, dtype, rows):
    torch.manual_seed(0)
    x = torch.randn(*rows, 40).to(dtype)
    packed = [ops.quantize_absmax(torch.randn(columns, 40), scheme) for columns in (24, 7, 600)]
    biases = [torch.randn(24), None, torch.randn(600).to(dtype)]
    found = ops.quantized_linears(x, packed, biases)
    for each, weight, bias in zip(found, packed, biases, strict=True):
        assert torch.equal(each, ops.quantized_linear(x, weight, bias))


def test_several_layers_of_one_input_have_gradients_and_errors_of_their_own():
    packed = [ops.quantize_absmax(torch.randn(4, 8), "int8") for _ in range(2)]
    x = torch.randn(3, 8, requires_grad=True)
    first, second = ops.quantized_linears(x, packed, [None, None])
    (first.sum() + second.sum()).backward()
    weight = packed[0].dequantize() + packed[1].dequantize()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
    with pytest.raises(ValueError, match="x must be"):
        ops.quantized_linears(torch.randn(3, 9), packed, [None, None])


@pytest.mark.parametrize("scheme", ["int8", "int8-weight"])
def test_blocks_of_rows_give_what_all_rows_at_once_do(scheme, monkeypatch):
    torch.manual_seed(0)
    x, bias = torch.randn(200, 600), torch.randn(500)
    packed = ops.quantize_absmax(torch.randn(500, 600), scheme)
    at_once = ops.quantized_linear(x, packed, bias, "gelu")
    monkeypatch.setattr(quantized_linear_cpu, "_WORK_SPACE", 1 << 12)
    assert choose(packed, x.dtype, 200, quantized_linear_cpu.instructions()).rows == (
        64 if quantized_linear_cpu.instructions().int8 else 1 << 30
    )
    assert torch.equal(ops.quantized_linear(x, packed, bias, "gelu"), at_once)
    (alone,) = ops.quantized_linears(x, [packed], [bias])
    assert torch.equal(alone, ops.quantized_linear(x, packed, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_in_blocks_is_rounding(dtype, monkeypatch):
    x, packed = torch.randn(203, 40).to(dtype), packed_of("int8", 40, 24)
    x[7], x[90] = 0.0, torch.inf
    at_once = ops.quantized_linear(x, packed)
    monkeypatch.setattr(quantized_linear_cpu, "_ROUNDED_AT_ONCE", 10 * 40)
    torch.testing.assert_close(ops.quantized_linear(x, packed), at_once, rtol=0, atol=0, equal_nan=True)
