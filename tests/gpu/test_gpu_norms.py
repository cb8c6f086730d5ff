"""Norms, fused with the residual and quantized, on the GPU against float64."""

from __future__ import annotations

import gpu_exact
import pytest
import torch
from gpu_checks import INTERPRETED, Draw, assert_exact, run_twice
from torch import Tensor

import fastattn
from fastattn import ops

EPS = 1e-5
WIDTHS = [1, 7, 64, 768, 4096] if INTERPRETED else [1, 7, 64, 384, 768, 1000, 4096, 8192, 16384, 30001, 65536]
QUANTIZED = [("int8", torch.int8, 127.0), ("fp8", torch.float8_e4m3fn, 448.0)]


def both(x: Tensor, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [1, 37], ids=["row", "rows"])
def test_layer_norm(
    width: int, rows: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    # Rows far from zero: a variance from E[x^2] - E[x]^2 would fail.
    x, weight, bias = draw(rows, width) + 3, draw(width), draw(width)
    (found,) = run_twice(lambda: ops.layer_norm(x, weight, bias, eps=EPS))
    exact, own = (gpu_exact.layer_norm(x, weight, bias, EPS, each) for each in (torch.float64, dtype))
    assert_exact(found, exact, own)
    (found,) = run_twice(lambda: ops.layer_norm(x, None, None, eps=EPS))
    exact, own = (gpu_exact.layer_norm(x, None, None, EPS, each) for each in (torch.float64, dtype))
    assert_exact(found, exact, own)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(
    width: int, offset: float, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    x, weight = draw(2, 19, width), draw(width)
    for each_weight in (weight, None) if offset == 0.0 else (weight,):
        (found,) = run_twice(lambda w=each_weight: ops.rms_norm(x, w, eps=EPS, offset=offset))
        exact, own = (gpu_exact.rms_norm(x, each_weight, EPS, offset, d) for d in (torch.float64, dtype))
        assert_exact(found, exact, own)


@pytest.mark.parametrize("width", WIDTHS)
def test_add_layer_norm(
    width: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    x, residual, weight, bias = draw(33, width), draw(33, width), draw(width), draw(width)
    normalized, total = run_twice(lambda: ops.add_layer_norm(x, residual, weight, bias, EPS))
    sums = [both(x, residual, each) for each in (torch.float64, dtype)]
    assert_exact(total, *sums, "sum")
    exact, own = (gpu_exact.layer_norm(each, weight, bias, EPS, each.dtype) for each in sums)
    assert_exact(normalized, exact, own, "normalized")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm(
    width: int, offset: float, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    draw = Draw(generator, device, dtype)
    x, residual, weight = draw(33, width), draw(33, width), draw(width)
    normalized, total = run_twice(lambda: ops.add_rms_norm(x, residual, weight, EPS, offset=offset))
    sums = [both(x, residual, each) for each in (torch.float64, dtype)]
    assert_exact(total, *sums, "sum")
    exact, own = (gpu_exact.rms_norm(each, weight, EPS, offset, each.dtype) for each in sums)
    assert_exact(normalized, exact, own, "normalized")


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("width", [64, 1000])
def test_dropout_is_the_reference_s(
    name: str, width: int, dtype: torch.dtype, generator: torch.Generator, device: torch.device
) -> None:
    """The same seed drops the same elements in the kernel and in float64 PyTorch."""
    draw = Draw(generator, device, dtype)
    x, residual, weight, bias = draw(50, width), draw(50, width), draw(width), draw(width)

    def seeded(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        inputs = tensors if name == "add_layer_norm" else tensors[:3]
        return getattr(ops, name)(*inputs, eps=EPS, dropout_p=0.4)

    normalized, total = run_twice(lambda: seeded(x, residual, weight, bias))
    with fastattn.set_backend("torch"):
        own = seeded(x, residual, weight, bias)
        exact = seeded(*(each.double() for each in (x, residual, weight, bias)))
    assert_exact(total, exact[1], own[1], "sum")
    assert_exact(normalized, exact[0], own[0], "normalized")
    dropped = (total == residual).double().mean().item()
    assert 0.3 < dropped < 0.5, f"{dropped:.2f} of the elements were dropped, asked for 0.4"


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize(("kind", "stored", "limit"), QUANTIZED, ids=["int8", "fp8"])
@pytest.mark.parametrize("width", WIDTHS[2:])
def test_quantized_rows(
    name: str, kind: str, stored: torch.dtype, limit: float, width: int, dtype: torch.dtype,
    generator: torch.Generator, device: torch.device,
) -> None:  # fmt: skip
    """quantized * scales is the exact row up to half a step of the stored type."""
    draw = Draw(generator, device, dtype)
    x, residual, weight, bias = draw(21, width), draw(21, width), draw(width), draw(width)
    inputs = (x, residual, weight, bias) if name == "add_layer_norm" else (x, residual, weight)
    codes, scales, total = run_twice(lambda: getattr(ops, name)(*inputs, eps=EPS, quantize=kind))
    assert codes.dtype == stored and scales.dtype == torch.float32 and scales.shape == (21, 1)
    sums = [both(x, residual, each) for each in (torch.float64, dtype)]
    assert_exact(total, *sums, "sum")
    if name == "add_layer_norm":
        exact, own = (gpu_exact.layer_norm(each, weight, bias, EPS, each.dtype) for each in sums)
    else:
        exact, own = (gpu_exact.rms_norm(each, weight, EPS, 0.0, each.dtype) for each in sums)
    largest = exact.abs().amax(-1, keepdim=True)
    assert_exact(scales, largest / limit, own.abs().amax(-1, keepdim=True).float() / limit, "scales")
    # int8 rounds to whole steps, e4m3 to 3 bits of mantissa and to steps of 2^-9 below its normal numbers.
    step = 0.5 if kind == "int8" else (codes.double().abs() / 16).clamp(min=2.0**-10)
    slack = 2 * (own.double() - exact).abs().max() + 2 * torch.finfo(dtype).eps * largest
    error = (codes.double() * scales.double() - exact).abs()
    allowed = (step + 1e-3) * scales.double() + slack
    assert (error <= allowed).all(), f"{(error / allowed).max():.3f} of the allowed error, {width} wide"


def test_strides(dtype: torch.dtype, generator: torch.Generator, device: torch.device) -> None:
    draw = Draw(generator, device, dtype)
    weight, bias = draw(96), draw(96)
    for x in (
        draw(5, 192)[:, ::2],
        draw(96, 6).t(),
        draw(4, 3, 96).transpose(0, 1),
        draw(1, 96).expand(7, 96),
    ):
        (found,) = run_twice(lambda x=x: ops.layer_norm(x, weight, bias, eps=EPS))
        exact, own = (gpu_exact.layer_norm(x, weight, bias, EPS, each) for each in (torch.float64, dtype))
        assert_exact(found, exact, own)
        normalized, total = run_twice(lambda x=x: ops.add_rms_norm(x, x, weight, EPS))
        exact, own = (gpu_exact.rms_norm(both(x, x, d), weight, EPS, 0.0, d) for d in (torch.float64, dtype))
        assert_exact(normalized, exact, own)
        assert_exact(total, both(x, x, torch.float64), both(x, x, dtype), "sum")
