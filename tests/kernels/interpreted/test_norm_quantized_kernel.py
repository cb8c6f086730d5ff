"""Norms quantized in the same pass, in the interpreter: int8 and fp8 rows with their scales."""

from __future__ import annotations

import pointwise_reference as pointwise
import pytest
import torch
from fastattn_kernels.norm import add_layer_norm_quantized_forward, add_rms_norm_quantized_forward
from hypothesis import given, settings
from hypothesis import strategies as st

QUANTIZE = pytest.mark.parametrize("quantize", ["int8", "fp8"])
WIDTHS = pytest.mark.parametrize("width", [40, 20000])
LARGEST = {"int8": 127.0, "fp8": 448.0}
EPS = 1e-5


def rms(x: torch.Tensor, weight: torch.Tensor | None, quantize: str, eps: float = EPS) -> list[torch.Tensor]:
    """(quantized, scales) of x alone."""
    outputs = add_rms_norm_quantized_forward(x, torch.zeros_like(x), weight, eps, 0.0, 0.0, None, quantize)
    return list(outputs[:2])


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_rows_times_scales_are_the_norm(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 300) | st.sampled_from([1025, 16385, 20000]), "width")
    leading = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=2), "leading")
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]), "dtype")
    quantize = data.draw(st.sampled_from(["int8", "fp8"]), "quantize")
    generator = torch.Generator().manual_seed(width)
    x, residual = (torch.randn(*leading, width, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))
    x = pointwise.arrange(x, data.draw(st.sampled_from(pointwise.LAYOUTS), "layout"))
    if data.draw(st.booleans(), "rms"):
        rows, scales, total = add_rms_norm_quantized_forward(
            x, residual, weight, EPS, 1.0, 0.0, None, quantize
        )
        exact = pointwise.rms_norm(total.double(), weight.double(), EPS, 1.0)
    else:
        rows, scales, total = add_layer_norm_quantized_forward(
            x, residual, weight, bias, EPS, 0.0, None, quantize
        )
        exact = pointwise.layer_norm(total.double(), weight.double(), bias.double(), EPS)
    assert torch.equal(total, x + residual) and total.is_contiguous()
    assert rows.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[quantize] and rows.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == (*leading, 1)
    magnitude = exact.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scales.double(), magnitude / LARGEST[quantize], rtol=1e-5, atol=1e-12)
    steps = exact / scales.double()
    if quantize == "int8":
        allowed = torch.full_like(steps, 0.5)
    else:
        # Half a step: 3 bits of mantissa, the smallest normal number is 2**-6.
        allowed = 2.0 ** (steps.abs().clamp(min=2.0**-6).log2().floor() - 4)
    # The kernel's norm is float32's: near a tie it may round the other way.
    error = (rows.double() - steps).abs() - allowed
    assert error.max() <= 1e-4 * LARGEST[quantize], (width, leading, dtype, quantize, error.max())


@pytest.mark.parametrize("shift", [0.0, 1e-4, -1e-4])
def test_fp8_rounds_as_pytorch_does(shift: float) -> None:
    # The weight makes the row every number of the format, the ties between neighbours, and both negated; the
    # largest is 448, so that the scale is 1.
    numbers = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    positive = torch.cat([numbers[1:], (numbers[1:] + numbers[:-1]) / 2]) * (1 + shift)
    points = torch.cat([positive, -positive, torch.tensor([0.0, 448.0])]).clamp(-448, 448)
    rows, scales = rms(torch.ones(1, len(points)), points, "fp8", eps=0.0)
    torch.testing.assert_close(scales, torch.ones(1, 1), rtol=1e-6, atol=0)
    assert torch.equal(rows[0].view(torch.uint8), points.to(torch.float8_e4m3fn).view(torch.uint8))


def test_int8_rounds_halves_to_even() -> None:
    points = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 0.49, -127.0])
    rows, _ = rms(torch.ones(1, len(points)), points, "int8", eps=0.0)
    assert rows[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126, 0, -127]


@QUANTIZE
@WIDTHS
def test_the_largest_magnitude_fills_the_range(width: int, quantize: str) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 4)[:, None]
    rows, _ = rms(x, None, quantize)
    assert (rows.float().abs().amax(-1) == LARGEST[quantize]).all()


@QUANTIZE
@WIDTHS
def test_a_row_of_zeros_has_scale_one(width: int, quantize: str) -> None:
    x = torch.stack([torch.zeros(width), torch.ones(width)])
    rows, scales = rms(x, None, quantize, eps=1e-6)
    assert scales[0] == 1.0 and (rows[0].float() == 0).all() and scales[1] != 1.0
    # So small that the scale would be subnormal and its inverse infinite.
    rows, scales = rms(x, torch.full((width,), 1e-41), quantize)
    assert (scales == 1.0).all() and (rows.float() == 0).all()


@QUANTIZE
@WIDTHS
def test_a_row_with_nan_has_scale_nan(width: int, quantize: str) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    expected_rows, expected_scales = rms(x, None, quantize)
    x[1, 3] = float("nan")
    rows, scales = rms(x, None, quantize)
    assert scales[1].isnan()
    for row in (0, 2):
        assert torch.equal(rows[row].view(torch.uint8), expected_rows[row].view(torch.uint8))
        assert scales[row] == expected_scales[row]


@QUANTIZE
@WIDTHS
def test_dropout_is_that_of_the_plain_norm(width: int, quantize: str) -> None:
    from fastattn_kernels.norm import add_layer_norm_forward

    x, residual = torch.randn(2, 3, width), torch.randn(3, width)
    seed = torch.tensor([11])
    arguments = (x[0], residual, None, None, EPS, 0.3, seed)
    normalized, total = add_layer_norm_forward(*arguments)
    rows, scales, quantized_total = add_layer_norm_quantized_forward(*arguments, quantize)
    assert torch.equal(total, quantized_total)
    torch.testing.assert_close(rows.float() * scales, normalized, rtol=0.07, atol=0.02)


@QUANTIZE
@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_quantize(shape: tuple[int, ...], quantize: str) -> None:
    rows, scales = rms(torch.ones(shape), None, quantize)
    assert rows.shape == shape and torch.equal(scales, torch.ones(shape[0], 1))
