"""Bias and GELU, and gated activations, in the interpreter against float64."""

from __future__ import annotations

import float64_reference as reference
import pointwise_reference as pointwise
import pytest
import torch
from fastattn_kernels._rows import as_rows
from fastattn_kernels.activation import bias_gelu_forward, gated_activation_forward
from hypothesis import given, settings
from hypothesis import strategies as st
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


def check_gated(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    out = gated_activation_forward(gate, up, kind)
    assert out.dtype == gate.dtype and out.is_contiguous()
    exact = pointwise.gated_activation(gate.double(), up.double(), kind)
    own = pointwise.gated_activation(gate, up, kind)
    reference.assert_as_exact_as_pytorch(out, exact, own, f"{kind} {tuple(gate.shape)} {gate.stride()}")
    return out


@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_gate(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 200) | st.sampled_from([1024, 1025, 3072]), "width")
    shape = (*data.draw(st.lists(st.integers(1, 4), max_size=3), "leading"), width)
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]), "dtype")
    generator = torch.Generator().manual_seed(width)
    if data.draw(st.booleans(), "halves of one tensor"):
        wide = (2 * torch.randn(*shape[:-1], 2 * width, generator=generator)).to(dtype)
        gate, up = wide.chunk(2, -1)
    else:
        gate, up = (
            pointwise.arrange(
                (2 * torch.randn(shape, generator=generator)).to(dtype),
                data.draw(st.sampled_from(pointwise.LAYOUTS)),
            )
            for _ in range(2)
        )
    check_gated(gate, up, data.draw(st.sampled_from(["silu", "gelu", "gelu_tanh"]), "kind"))


def test_halves_of_one_tensor_are_not_copied() -> None:
    wide = torch.randn(2, 3, 5, 32)
    for half in wide.chunk(2, -1):
        assert as_rows(half)[0].data_ptr() == half.data_ptr()


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_extreme_gates(kind: str) -> None:
    gate = torch.tensor([[0.0, -0.0, 1e-30, 12.0, -12.0, 100.0, -100.0, 1e4, -1e4, float("nan")]])
    out = check_gated(gate, torch.full_like(gate, 2.0), kind)
    assert out[0, 7] == 2e4 and out[0, 8] == 0.0 and out[0, 9].isnan()
    # A factor that is not finite meets the gate as a product does.
    factors = torch.tensor([[float("inf"), float("-inf"), float("nan")]])
    found = gated_activation_forward(torch.full_like(factors, 3.0), factors, kind)
    assert torch.equal(found.nan_to_num(7.0, 8.0, 9.0), torch.tensor([[8.0, 9.0, 7.0]]))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_no_gates(shape: tuple[int, ...]) -> None:
    assert gated_activation_forward(torch.ones(shape), torch.ones(shape), "silu").shape == shape
