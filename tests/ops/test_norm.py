"""`ops.layer_norm`, `ops.rms_norm` and their forms with a residual against PyTorch's own and float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close
from torch.nn.functional import layer_norm, rms_norm

from fastattn import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Widths of one, odd, of models, powers of two and the widest; no rows.
SHAPES = pytest.mark.parametrize(
    "shape", [(3, 5, 64), (7, 33), (1, 1), (0, 8), (64,), (2, 1, 1000), (2, 768), (2, 65536)]
)
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
QUANTIZE = pytest.mark.parametrize("quantize", ["int8", "fp8"])
LARGEST = {"int8": 127.0, "fp8": 448.0}
EPS = 1e-5


def exact_layer_norm(x, weight, bias):
    return layer_norm(
        x.double(), x.shape[-1:], *(p if p is None else p.double() for p in (weight, bias)), EPS
    )


def exact_rms_norm(x, weight, offset=0.0):
    return rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double() + offset, EPS)


@DTYPES
@SHAPES
@pytest.mark.parametrize("affine", [(True, True), (True, False), (False, False)])
def test_layer_norm(dtype, shape, affine):
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    weight, bias = (torch.randn(shape[-1], dtype=dtype) if used else None for used in affine)
    own = layer_norm(x, shape[-1:], weight, bias, EPS)
    assert_close(ops.layer_norm(x, weight, bias, EPS), own, exact_layer_norm(x, weight, bias))
    normalized, total = ops.add_layer_norm(x, x * 2, weight, bias, EPS)
    assert torch.equal(total, x * 2 + x)
    own = layer_norm(total, shape[-1:], weight, bias, EPS)
    assert_close(normalized, own, exact_layer_norm(total, weight, bias))


@DTYPES
@SHAPES
@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm(dtype, shape, affine):
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    weight = torch.randn(shape[-1], dtype=dtype) if affine else None
    own = rms_norm(x, shape[-1:], weight, EPS)
    assert_close(ops.rms_norm(x, weight, EPS), own, exact_rms_norm(x, weight))
    normalized, total = ops.add_rms_norm(x, x * 2, weight, EPS)
    assert torch.equal(total, x * 2 + x)
    assert_close(normalized, rms_norm(total, shape[-1:], weight, EPS), exact_rms_norm(total, weight))


@DTYPES
def test_rms_norm_beside_the_models_own(dtype):
    # Rounded once, it is no further from the truth than Llama's (rounded before the weight) or Gemma's.
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = torch.randn(64, 256).to(dtype) * 3, torch.randn(256).to(dtype)
    for module, offset in ((LlamaRMSNorm(256, EPS), 0.0), (GemmaRMSNorm(256, EPS), 1.0)):
        module = module.to(dtype)
        module.weight.data.copy_(weight)
        found = ops.rms_norm(x, module.weight, EPS, offset)
        assert found.dtype == dtype
        assert_close(found, module(x), exact_rms_norm(x, weight, offset))
        normalized, total = ops.add_rms_norm(x, x, module.weight, EPS, offset=offset)
        assert_close(normalized, module(total), exact_rms_norm(total, weight, offset))


def test_mixed_dtypes_are_promoted_and_parameters_may_be_float32():
    x, residual = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
    weight, bias = torch.randn(8), torch.randn(8)
    normalized, total = ops.add_layer_norm(x, residual, weight, bias, EPS)
    assert normalized.dtype == total.dtype == torch.float32
    torch.testing.assert_close(normalized, layer_norm(x + residual, (8,), weight, bias, EPS))
    normalized, total = ops.add_rms_norm(x, residual, weight, EPS)
    assert normalized.dtype == total.dtype == torch.float32
    for found, exact in (
        (ops.layer_norm(x, weight, bias, EPS), exact_layer_norm(x, weight, bias)),
        (ops.rms_norm(x, weight, EPS), exact_rms_norm(x, weight)),
    ):
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.bfloat16())


@RMS
def test_any_strides_and_no_aliasing(rms):
    x, residual = torch.randn(8, 5).T, torch.randn(5, 16)[:, ::2]
    before = x.clone()
    if rms:
        alone = ops.rms_norm(x, None, EPS)
        normalized, total = ops.add_rms_norm(x, residual, None, EPS)
        torch.testing.assert_close(normalized, rms_norm(x + residual, (8,), None, EPS))
    else:
        alone = ops.layer_norm(x, None, None, EPS)
        normalized, total = ops.add_layer_norm(x, residual, None, None, EPS)
        torch.testing.assert_close(normalized, layer_norm(x + residual, (8,)))
    assert len({t.data_ptr() for t in (x, residual, alone, normalized, total)}) == 5
    assert torch.equal(x, before)


@RMS
def test_dropout(rms):
    def run(p):
        torch.manual_seed(5)
        if rms:
            return ops.add_rms_norm(x, residual, None, EPS, dropout_p=p)
        return ops.add_layer_norm(x, residual, None, None, EPS, dropout_p=p)

    x, residual = torch.ones(64, 256, requires_grad=True), torch.zeros(64, 256)
    normalized, total = run(0.25)
    assert set(total.detach().unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((total == 0).float().mean().item() - 0.25) < 0.02
    own = rms_norm(total, (256,), None, EPS) if rms else layer_norm(total, (256,))
    torch.testing.assert_close(normalized, own)
    (gradient,) = torch.autograd.grad(total.sum(), x)
    assert torch.equal(gradient, total)
    assert torch.equal(run(0.25)[1], total)
    assert (run(1.0)[1] == 0).all()


def test_rows_of_zeros_a_row_with_nan_and_the_largest_half():
    x = torch.stack([torch.zeros(64), torch.full((64,), 65504.0), torch.ones(64)]).half()
    x[1, ::2] *= -1
    for norm in (lambda x: ops.layer_norm(x, None, None, EPS), lambda x: ops.rms_norm(x, None, EPS)):
        normalized = norm(x)
        assert (normalized[0] == 0).all() and (normalized[1].abs() == 1).all()
        x[2, 5] = float("nan")
        assert norm(x)[2].isnan().all() and torch.equal(norm(x)[:2], normalized[:2])
        x[2, 5] = 1.0


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (lambda *a: ops.layer_norm(*a, EPS), [(3, 8), (8,), (8,)]),
        (lambda *a: ops.rms_norm(*a, EPS), [(3, 8), (8,)]),
        (lambda *a: ops.rms_norm(*a, EPS, 1.0), [(3, 8), (8,)]),
        (lambda *a: ops.add_layer_norm(*a, EPS), [(3, 8), (3, 8), (8,), (8,)]),
        (lambda *a: ops.add_rms_norm(*a, EPS, offset=1.0), [(3, 8), (3, 8), (8,)]),
    ],
)
def test_gradients(call, shapes):
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(call, leaves)


@DTYPES
@QUANTIZE
@RMS
@pytest.mark.parametrize("shape", [(3, 5, 64), (33,), (2, 5000)])
def test_quantized_rows_times_scales_are_the_norm(shape, rms, quantize, dtype):
    x, residual = (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)
    if rms:
        rows, scales, total = ops.add_rms_norm(x, residual, weight, EPS, offset=1.0, quantize=quantize)
        exact = exact_rms_norm(total, weight, 1.0)
    else:
        rows, scales, total = ops.add_layer_norm(x, residual, weight, bias, EPS, quantize=quantize)
        exact = exact_layer_norm(total, weight, bias)
    assert torch.equal(total, residual + x)
    assert rows.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[quantize] and rows.shape == shape
    assert scales.dtype == torch.float32 and scales.shape == (*shape[:-1], 1)
    magnitude = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scales.double(), magnitude / LARGEST[quantize], rtol=1e-5, atol=0)
    error = (rows.double() * scales - exact).abs()
    if quantize == "int8":
        allowed = scales.double() / 2
    else:
        # 3 bits of mantissa; below the smallest normal number steps are 2**-9.
        allowed = torch.maximum(exact.abs() / 16, scales.double() * 2.0**-10)
    assert (error <= allowed * 1.001 + 1e-6 * magnitude).all()


@QUANTIZE
def test_quantizing_rows_of_zeros_and_with_nan(quantize):
    x = torch.stack([torch.zeros(64), torch.ones(64), torch.ones(64)])
    x[2, 3] = float("nan")
    rows, scales, _ = ops.add_rms_norm(x, torch.zeros_like(x), None, EPS, quantize=quantize)
    assert scales[0] == 1.0 and (rows[0].float() == 0).all()
    assert (rows[1].float() == LARGEST[quantize]).all() and scales[2].isnan()
    rows, scales, _ = ops.add_rms_norm(torch.ones(0, 64), torch.ones(0, 64), None, EPS, quantize=quantize)
    assert rows.shape == (0, 64) and scales.shape == (0, 1)


def test_int8_rounds_halves_to_even():
    # The row is its weight; its largest magnitude is 127, so that the scale is 1.
    points = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5])
    x = torch.ones(1, len(points))
    rows, scales, _ = ops.add_rms_norm(x, torch.zeros_like(x), points, 0.0, quantize="int8")
    assert scales.item() == 1.0
    assert rows[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126]


@QUANTIZE
def test_a_backward_through_quantized_rows_raises(quantize):
    x = torch.randn(3, 8, requires_grad=True)
    _, scales, total = ops.add_rms_norm(x, x, torch.ones(8), EPS, quantize=quantize)
    for output in (scales, total):
        with pytest.raises(RuntimeError, match="no gradient; call with quantize=None"):
            output.sum().backward(retain_graph=True)


ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ops.add_layer_norm(ONES, torch.ones(2, 5), None, None, EPS),
            ValueError,
            r"add_layer_norm: .* one shape \[..., N\]; got \[2, 4\] and \[2, 5\]",
        ),
        (lambda: ops.add_rms_norm(ONES, ONES[0], None, EPS), ValueError, "add_rms_norm: .* one shape"),
        (
            lambda: ops.add_layer_norm(ONES, ONES, torch.ones(3), None, EPS),
            ValueError,
            r"weight must be \[4\]; got \[3\]",
        ),
        (lambda: ops.rms_norm(ONES, torch.ones(1, 4), EPS), ValueError, r"rms_norm: weight must be \[4\]"),
        (lambda: ops.layer_norm(ONES, None, torch.ones(5), EPS), ValueError, r"layer_norm: bias must be"),
        (lambda: ops.layer_norm(torch.ones(()), None, None, EPS), ValueError, "got a scalar"),
        (lambda: ops.add_layer_norm(ONES, ONES, None, None, EPS, 2.0), ValueError, "dropout_p is 2.0"),
        (lambda: ops.add_rms_norm(ONES, ONES, None, EPS, -0.5), ValueError, "dropout_p is -0.5"),
        (lambda: ops.rms_norm(ONES, None, -1.0), ValueError, "eps is -1.0; it must be at least 0"),
        (lambda: ops.rms_norm(ONES, None, EPS, 1.0), ValueError, "offset is 1.0 without a weight"),
        (lambda: ops.add_layer_norm(ONES.int(), ONES, None, None, EPS), TypeError, "x is torch.int32"),
        (lambda: ops.add_rms_norm(ONES, ONES.bool(), None, EPS), TypeError, "residual is torch.bool"),
        (
            lambda: ops.layer_norm(ONES, torch.ones(4, device="meta"), None, EPS),
            ValueError,
            "weight is on meta but x is on cpu",
        ),
        (
            lambda: ops.add_rms_norm(ONES, ONES, None, EPS, quantize="int4"),
            ValueError,
            "quantize is 'int4'; accepted are None, 'int8' and 'fp8'",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
