"""Residual add and layer norm in the interpreter: the sum equals PyTorch's, the norm is near float64's."""

from __future__ import annotations

import float64_reference as reference
import pytest
import torch
from fastattn_kernels.norm import add_layer_norm_forward
from torch.nn.functional import layer_norm

# Not bfloat16: the interpreter truncates where a GPU rounds to nearest.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
EPS = 1e-5


def make(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(shape[-1])
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
    return x + mean, residual, weight, bias


def check(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None,
    eps: float = EPS, dropout_p: float = 0.0, seed: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    normalized, total = add_layer_norm_forward(x, residual, weight, bias, eps, dropout_p, seed)
    kept = x
    if dropout_p:
        assert seed is not None
        rows = torch.arange(x.numel() // x.shape[-1]).view(x.shape[:-1])
        keep = reference.keep_mask(int(seed), rows, x.shape[-1], dropout_p).view(x.shape)
        kept = (x * keep).float().mul(1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0).to(x.dtype)
    assert total.dtype == normalized.dtype == x.dtype
    assert total.is_contiguous() and normalized.is_contiguous()
    assert torch.equal(total, residual + kept), "the sum must be the unfused sum"
    doubles = [None if p is None else p.double() for p in (weight, bias)]
    exact = layer_norm(total.double(), x.shape[-1:], *doubles, eps)
    pytorch = layer_norm(total, x.shape[-1:], weight, bias, eps)
    reference.assert_as_exact_as_pytorch(normalized, exact, pytorch, f"normalized {tuple(x.shape)}")
    return normalized


@DTYPES
@pytest.mark.parametrize(
    "shape",
    # Widths of one, odd, of models (384, 768, 1024, 5120), a power of two and one more; rows that do not fill
    # a program.
    [(7, 1), (3, 2, 33), (5, 384), (33, 768), (2, 1024), (4, 1025), (1, 5120), (2, 2, 3, 16), (64,)],
)
def test_shapes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*make(shape, dtype))


@DTYPES
@pytest.mark.parametrize("width", [8192, 8193, 16384, 16385, 20000, 65536])
def test_wide_rows(width: int, dtype: torch.dtype) -> None:
    check(*make((2, width), dtype, mean=2.0))


@pytest.mark.parametrize("width", [300, 20000])
def test_a_large_mean_does_not_cancel(width: int) -> None:
    # E[x^2] - E[x]^2 would lose everything here.
    check(*make((3, width), torch.float32, mean=3000.0))


@pytest.mark.parametrize("width", [300, 20000])
def test_weight_and_bias_are_optional(width: int) -> None:
    x, residual, weight, bias = make((3, width), torch.float32)
    check(x, residual, None, None)
    check(x, residual, weight, None)
    check(x, residual, None, bias, eps=1e-12)


@pytest.mark.parametrize("width", [300, 20000])
def test_float32_parameters_of_half_precision_rows(width: int) -> None:
    x, residual, weight, bias = make((3, width), torch.float16)
    check(x, residual, weight.float(), bias.float())


@pytest.mark.parametrize("width", [40, 20000])
def test_any_strides(width: int) -> None:
    x, residual, weight, bias = make((4, 3, width), torch.float32)
    expected = check(x, residual, weight, bias)
    rows_apart = torch.cat([x, x + 1], -1)[..., :width]
    rows_swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    every_other = x.repeat_interleave(2, -1)[..., ::2]
    for arranged in (rows_apart, rows_swapped, every_other):
        assert torch.equal(check(arranged, residual, weight, bias), expected)
    assert torch.equal(check(x, rows_apart, weight, bias), check(x, x.contiguous(), weight, bias))
    parameter = torch.stack([weight, bias], -1)
    assert torch.equal(check(x, residual, parameter[:, 0], parameter[:, 1]), expected)
    check(x, residual[:1].expand(4, 3, width), weight, bias)


@DTYPES
@pytest.mark.parametrize("width", [40, 20000])
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
def test_dropout_is_the_formula_s(dropout_p: float, width: int, dtype: torch.dtype) -> None:
    check(*make((2, 3, width), dtype), dropout_p=dropout_p, seed=torch.tensor([-(2**40) + 3]))


def test_dropout_repeats() -> None:
    x, residual, weight, bias = make((4, 300), torch.float32)
    runs = [add_layer_norm_forward(x, residual, weight, bias, EPS, 0.3, torch.tensor([s])) for s in (5, 5, 6)]
    assert torch.equal(runs[0][1], runs[1][1]) and not torch.equal(runs[0][1], runs[2][1])


@pytest.mark.parametrize("width", [40, 20000])
def test_a_bad_row_stays_alone(width: int) -> None:
    x, residual, weight, bias = make((5, width), torch.float32)
    expected, _ = add_layer_norm_forward(x, residual, weight, bias, EPS, 0.0, None)
    x[2, 7] = float("nan")
    actual, _ = add_layer_norm_forward(x, residual, weight, bias, EPS, 0.0, None)
    assert actual[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(actual[others], expected[others])


def test_a_constant_row_is_the_bias() -> None:
    _, _, weight, bias = make((3, 300), torch.float32)
    constant = torch.full((3, 300), 7.0)
    normalized, _ = add_layer_norm_forward(constant, constant, weight, bias, EPS, 0.0, None)
    torch.testing.assert_close(normalized, bias.expand(3, 300), rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [300, 20000])
def test_the_norm_is_of_the_rounded_sum(width: int) -> None:
    # float16 is 2 apart at 2048: what is added is lost in the sum, and must be in the norm, as it is unfused.
    x, _, weight, bias = make((3, width), torch.float16)
    normalized, total = add_layer_norm_forward(
        x.clamp(-0.4, 0.4), torch.full_like(x, 2048.0), weight, bias, EPS, 0.0, None
    )
    assert (total == 2048.0).all()
    assert torch.equal(normalized, bias.expand(3, width))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    normalized, total = add_layer_norm_forward(
        torch.ones(shape), torch.ones(shape), None, None, EPS, 0.0, None
    )
    assert normalized.shape == total.shape == shape
