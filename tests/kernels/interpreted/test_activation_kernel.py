"""Bias and GELU in the interpreter against float64."""

from __future__ import annotations

import float64_reference as reference
import pytest
import torch
from fastattn_kernels.activation import bias_gelu_forward
from torch.nn.functional import gelu

# Not bfloat16: the interpreter truncates where a GPU rounds to nearest.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
KINDS = pytest.mark.parametrize("approximate", ["none", "tanh"])


def check(x: torch.Tensor, bias: torch.Tensor, approximate: str) -> torch.Tensor:
    out = bias_gelu_forward(x, bias, approximate)
    assert out.dtype == x.dtype and out.is_contiguous()
    exact = gelu(x.double() + bias.double(), approximate=approximate)
    reference.assert_as_exact_as_pytorch(
        out, exact, gelu(x + bias, approximate=approximate), f"{tuple(x.shape)}"
    )
    return out


@DTYPES
@KINDS
@pytest.mark.parametrize(
    "shape", [(1, 1), (5, 7), (3, 2, 384), (9, 1024), (4, 1025), (2, 3072), (40, 30), (64,)]
)
def test_shapes(shape: tuple[int, ...], approximate: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator).to(dtype) * 2
    check(x, torch.randn(shape[-1], generator=generator).to(dtype), approximate)


@KINDS
def test_extremes(approximate: str) -> None:
    extremes = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        5.0,
        -5.0,
        12.0,
        -12.0,
        1e4,
        -1e4,
        3e38,
        -3e38,
        float("inf"),
        float("nan"),
    ]
    out = check(torch.tensor([extremes]), torch.zeros(len(extremes)), approximate)
    assert out[0, 10] == torch.tensor(3e38) and out[0, 11] == 0.0


@KINDS
def test_the_left_tail_keeps_its_relative_size(approximate: str) -> None:
    # Where tanh and erf are -1 to rounding, what is left of 1 + tanh would be noise.
    x = torch.linspace(-3.0, -0.5, 64)[None]
    out = bias_gelu_forward(x, torch.zeros(64), approximate)
    torch.testing.assert_close(out.double(), gelu(x.double(), approximate=approximate), rtol=2e-4, atol=0)


@KINDS
def test_any_strides(approximate: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, bias = torch.randn(4, 3, 40, generator=generator), torch.randn(40, generator=generator)
    expected = check(x, bias, approximate)
    rows_apart = torch.cat([x, x + 1], -1)[..., :40]
    rows_swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    every_other = x.repeat_interleave(2, -1)[..., ::2]
    for arranged in (rows_apart, rows_swapped, every_other):
        assert torch.equal(check(arranged, bias, approximate), expected)
    assert torch.equal(check(x, bias.repeat_interleave(3)[::3], approximate), expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_no_rows(shape: tuple[int, ...]) -> None:
    assert bias_gelu_forward(torch.ones(shape), torch.ones(8), "none").shape == shape
