"""Masked softmax in the interpreter against float64."""

from __future__ import annotations

import float64_reference as reference
import pointwise_reference as pointwise
import pytest
import torch
from fastattn_kernels.softmax import softmax_forward
from hypothesis import given, settings
from hypothesis import strategies as st

# Not bfloat16: the interpreter truncates where a GPU rounds to nearest.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
# In registers, and in a loop.
WIDTHS = pytest.mark.parametrize("width", [40, 20000])


def check(
    x: torch.Tensor, mask: torch.Tensor | None = None, scale: float = 1.0, causal: bool = False
) -> torch.Tensor:
    out = softmax_forward(x, mask, scale, causal)
    assert out.dtype == x.dtype and out.is_contiguous()
    exact = pointwise.softmax(x.double(), mask, scale, causal)
    own = pointwise.softmax(x, mask, scale, causal)
    what = f"{tuple(x.shape)} {x.stride()} scale {scale} causal {causal}"
    reference.assert_as_exact_as_pytorch(out, exact, own, what)
    assert (out[exact == 0] == 0).all(), f"{what}: hidden columns have weight"
    return out


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_form(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 200) | st.sampled_from([512, 1025, 8200, 16500]), "width")
    most, dimensions = (6, 4) if width <= 512 else (2, 2)
    leading = data.draw(st.lists(st.integers(1, most), max_size=dimensions), "leading")
    shape = (*leading, width)
    generator = torch.Generator().manual_seed(width)
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]), "dtype")
    x = (3 * torch.randn(shape, generator=generator)).to(dtype)
    x = pointwise.arrange(x, data.draw(st.sampled_from(pointwise.LAYOUTS), "layout"))
    mask = None
    if data.draw(st.booleans(), "masked"):
        # Broadcast along any dimensions, and of fewer than x has.
        kept = [data.draw(st.booleans()) for _ in shape]
        sizes = [size if keep else 1 for size, keep in zip(shape, kept, strict=True)]
        sizes = sizes[data.draw(st.integers(0, len(leading)), "dimensions left out") :]
        mask = torch.rand(sizes, generator=generator) < data.draw(st.sampled_from([0.0, 0.2, 0.7]), "density")
    scale = data.draw(st.sampled_from([1.0, 0.125, -0.5, 3.0]), "scale")
    check(x, mask, scale, causal=bool(leading) and data.draw(st.booleans(), "causal"))


@DTYPES
@pytest.mark.parametrize("width", [8193, 65536])
def test_long_rows(width: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    check(x)
    check(x, torch.arange(width) % 3 != 0, causal=True)


@WIDTHS
def test_a_row_that_sees_nothing_is_zeros(width: int) -> None:
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(4, width, dtype=torch.bool)
    mask[1] = False
    x[2] = float("-inf")
    out = check(x, mask)
    assert (out[1:3] == 0).all()
    torch.testing.assert_close(out.sum(-1), torch.tensor([1.0, 0.0, 0.0, 1.0]))


def test_more_rows_than_columns_leave_the_first_without_any() -> None:
    out = check(torch.zeros(2, 42, 40), causal=True)
    assert (out[:, :2] == 0).all()
    torch.testing.assert_close(out[:, 2:].sum(-1), torch.ones(2, 40))


@DTYPES
@WIDTHS
def test_infinities_and_the_largest_numbers(width: int, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.zeros(4, width, dtype=dtype)
    x[0, 3], x[0, 5] = largest, -largest
    x[1] = largest
    x[2, 1:] = float("-inf")
    x[3] = -largest
    out = check(x)
    assert out[0, 3] == 1 and out[2, 0] == 1
    # An infinity among the columns seen has no softmax.
    x[0, 3] = float("inf")
    assert softmax_forward(x, None, 1.0, False)[0].isnan().any()


@WIDTHS
def test_what_is_hidden_is_never_in_the_result(width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(width) % 2 == 0
    expected = softmax_forward(x, mask, 0.5, True)
    x[:, 1::2] = float("nan")
    x[:2, -1] = float("inf")
    assert torch.equal(softmax_forward(x, mask, 0.5, True), expected)
    # What is seen is: NaN stays in its row.
    x[1, 0] = float("nan")
    out = softmax_forward(x, mask, 0.5, True)
    assert out[1, ::2][: width // 2 - 1].isnan().all()
    assert torch.equal(out[::2], expected[::2])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (3, 0)])
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    assert softmax_forward(torch.ones(shape), None, 1.0, False).shape == shape
