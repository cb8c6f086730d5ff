"""Layer and RMS norms, with residual addition, in the interpreter: the sum equals PyTorch's, the norm is near
float64's.
"""

from __future__ import annotations

import float64_reference as reference
import pointwise_reference as pointwise
import pytest
import torch
from fastattn_kernels.norm import (
    add_layer_norm_forward,
    add_rms_norm_forward,
    layer_norm_forward,
    rms_norm_forward,
)
from hypothesis import given, settings
from hypothesis import strategies as st

# Not bfloat16: the interpreter truncates where a GPU rounds to nearest.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
RMS = pytest.mark.parametrize("rms", [False, True], ids=["layer", "rms"])
EPS = 1e-5
SEED = torch.tensor([-(2**40) + 3])

Tensor = torch.Tensor


def make(shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(shape[-1])
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(shape[-1], generator=generator).to(dtype) for _ in range(2))
    return x + mean, residual, weight, bias


def check(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, *, rms: bool = False,
    eps: float = EPS, offset: float = 0.0, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """The normalized rows, compared with what they should be; an RMS norm takes no bias."""
    bias = None if rms else bias
    total = x
    if residual is None:
        normalized = (
            rms_norm_forward(x, weight, eps, offset) if rms else layer_norm_forward(x, weight, bias, eps)
        )
    else:
        if rms:
            normalized, total = add_rms_norm_forward(x, residual, weight, eps, offset, dropout_p, SEED)
        else:
            normalized, total = add_layer_norm_forward(x, residual, weight, bias, eps, dropout_p, SEED)
        assert total.dtype == x.dtype and total.is_contiguous()
        assert torch.equal(total, residual + dropped(x, dropout_p)), "the sum must be the unfused sum"
    assert normalized.dtype == x.dtype and normalized.is_contiguous()
    doubles = [None if p is None else p.double() for p in (weight, bias)]
    if rms:
        exact = pointwise.rms_norm(total.double(), doubles[0], eps, offset)
        own = torch.nn.functional.rms_norm(
            total, x.shape[-1:], None if weight is None else (weight + offset).to(x.dtype), eps
        )
    else:
        exact = pointwise.layer_norm(total.double(), *doubles, eps)
        own = torch.nn.functional.layer_norm(total, x.shape[-1:], weight, bias, eps)
    reference.assert_as_exact_as_pytorch(normalized, exact, own, f"{tuple(x.shape)} {x.stride()} {x.dtype}")
    return normalized


def dropped(x: Tensor, dropout_p: float) -> Tensor:
    if dropout_p == 0.0:
        return x
    rows = torch.arange(x.numel() // x.shape[-1]).view(x.shape[:-1])
    keep = reference.keep_mask(int(SEED), rows, x.shape[-1], dropout_p).view(x.shape)
    return (x * keep).float().mul(1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0).to(x.dtype)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_form(data: st.DataObject) -> None:
    # Small rows several a program; from 8193 (fp32) and 16385 (fp16) on, a loop.
    width = data.draw(
        st.integers(1, 300) | st.sampled_from([384, 768, 1024, 1025, 5120, 16385, 20000]), "width"
    )
    most, dimensions = (4, 3) if width <= 1025 else (2, 1)
    leading = data.draw(st.lists(st.integers(1, most), max_size=dimensions), "leading")
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]), "dtype")
    x, residual, weight, bias = make((*leading, width), dtype, mean=data.draw(st.sampled_from([0.0, 2.0])))
    layouts = st.sampled_from(pointwise.LAYOUTS)
    with_residual, with_weight, with_bias, rms = (data.draw(st.booleans()) for _ in range(4))
    check(
        pointwise.arrange(x, data.draw(layouts, "layout of x")),
        pointwise.arrange(residual, data.draw(layouts, "layout of residual")) if with_residual else None,
        weight if with_weight else None,
        bias if with_bias else None,
        rms=rms,
        eps=data.draw(st.sampled_from([1e-5, 1e-6, 1e-2])),
        offset=data.draw(st.sampled_from([0.0, 1.0])) if with_weight and rms else 0.0,
        dropout_p=data.draw(st.sampled_from([0.0, 0.1, 0.5])) if with_residual else 0.0,
    )


@DTYPES
@RMS
@pytest.mark.parametrize("width", [8192, 65536])
def test_wide_rows(width: int, rms: bool, dtype: torch.dtype) -> None:
    check(*make((2, width), dtype, mean=2.0), rms=rms)


@pytest.mark.parametrize("width", [300, 20000])
def test_a_large_mean_does_not_cancel(width: int) -> None:
    # E[x^2] - E[x]^2 would lose everything here.
    check(*make((3, width), torch.float32, mean=3000.0))


@pytest.mark.parametrize("rms", [False, True])
def test_heads_of_a_packed_product_are_not_copied(rms: bool) -> None:
    from fastattn_kernels._rows import as_rows

    packed = torch.randn(2, 5, 3, 4, 16)  # [B, S, 3, H, D]
    query = packed[:, :, 0]
    assert as_rows(query)[0].data_ptr() == query.data_ptr()
    check(query, None, torch.randn(16), None, rms=rms)
    # Batch, heads and positions all out of line fold no further: copied, and right.
    check(query.transpose(1, 2)[:, :, 1:4], query[:, 1:4].transpose(1, 2), None, None, rms=rms)


@RMS
@pytest.mark.parametrize("width", [300, 20000])
def test_float32_parameters_of_half_precision_rows(width: int, rms: bool) -> None:
    x, residual, weight, bias = make((3, width), torch.float16)
    offset = 1.0 if rms else 0.0
    check(x, residual, weight.float(), bias.float(), rms=rms, offset=offset)
    strided = torch.stack([weight, bias], -1)
    check(x, residual, strided[:, 0], strided[:, 1], rms=rms)


@DTYPES
@RMS
@pytest.mark.parametrize("width", [40, 20000])
@pytest.mark.parametrize("dropout_p", [0.1, 1.0])
def test_dropout_is_the_formula_s(dropout_p: float, width: int, rms: bool, dtype: torch.dtype) -> None:
    check(*make((2, 3, width), dtype), dropout_p=dropout_p, rms=rms)


def test_dropout_repeats() -> None:
    x, residual, weight, bias = make((4, 300), torch.float32)
    runs = [add_layer_norm_forward(x, residual, weight, bias, EPS, 0.3, torch.tensor([s])) for s in (5, 5, 6)]
    assert torch.equal(runs[0][1], runs[1][1]) and not torch.equal(runs[0][1], runs[2][1])


@RMS
@pytest.mark.parametrize("width", [40, 20000])
def test_a_bad_row_stays_alone(width: int, rms: bool) -> None:
    x, residual, weight, bias = make((5, width), torch.float32)
    expected = check(x, residual, weight, bias, rms=rms)
    x[2, 7] = float("nan")
    if rms:
        actual, _ = add_rms_norm_forward(x, residual, weight, EPS, 0.0, 0.0, None)
    else:
        actual, _ = add_layer_norm_forward(x, residual, weight, bias, EPS, 0.0, None)
    assert actual[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(actual[others], expected[others])


def test_a_constant_row_is_the_bias() -> None:
    _, _, weight, bias = make((3, 300), torch.float32)
    normalized = layer_norm_forward(torch.full((3, 300), 7.0), weight, bias, EPS)
    torch.testing.assert_close(normalized, bias.expand(3, 300), rtol=0, atol=1e-5)


@RMS
@pytest.mark.parametrize("width", [40, 20000])
def test_rows_of_zeros_and_of_the_largest_half(width: int, rms: bool) -> None:
    # 65504 squared overflows float16, not float32.
    x = torch.stack([torch.zeros(width), torch.full((width,), 65504.0)]).half()
    x[1, ::2] *= -1
    normalized = check(x, None, None, None, rms=rms)
    assert (normalized[0] == 0).all() and (normalized[1].abs() == 1).all()


@pytest.mark.parametrize("width", [300, 20000])
def test_the_norm_is_of_the_rounded_sum(width: int) -> None:
    # float16 is 2 apart at 2048: what is added is lost in the sum, and must be in the norm, as it is unfused.
    x, _, weight, bias = make((3, width), torch.float16)
    normalized, total = add_layer_norm_forward(
        x.clamp(-0.4, 0.4), torch.full_like(x, 2048.0), weight, bias, EPS, 0.0, None
    )
    assert (total == 2048.0).all()
    assert torch.equal(normalized, bias.expand(3, width))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_to_normalize(shape: tuple[int, ...]) -> None:
    x = torch.ones(shape)
    outputs = [
        layer_norm_forward(x, None, None, EPS),
        rms_norm_forward(x, None, EPS, 0.0),
        *add_layer_norm_forward(x, x, None, None, EPS, 0.0, None),
        *add_rms_norm_forward(x, x, None, EPS, 0.0, 0.0, None),
    ]
    assert all(output.shape == shape for output in outputs)
