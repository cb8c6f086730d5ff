"""`quantized_linear` on a CPU: which of PyTorch's kernels multiply, and how, as measured to be fastest.

`torch._int_mm` multiplies int8 by int8 into int32 with VNNI or AMX and reads a weight [N, K] as it lies. It
serves "int8", and "int8-weight" as well: each row of x is split into two or three int8 digits, so many rows
more of one exact product. PyTorch's weight-only kernels take bfloat16 alone and pay off for few rows. What
remains is dequantized, a block of rows of the weight at a time, and multiplied in floating point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from fastattn.ops.int4_tiles import TILE_ROWS, tile_halves, tiles_are_the_kernels
from fastattn.ops.packed_weight import PackedWeight, expand_groups
from fastattn.ops.quantized_linear_reference import quantized_linear_reference
from fastattn.processor import cpu_flags

__all__ = [
    "Choice",
    "Instructions",
    "choose",
    "instructions",
    "quantized_linear_cpu",
    "quantized_linears_cpu",
]

# Sums of K products of magnitude 128 * 128 stay below 2 ** 31.
_LONGEST_INTEGER_SUM = 2**17 - 1
_TINY = torch.finfo(torch.float32).tiny
# Units of a row's magnitude in so many int8 digits, base 256: just below the largest number they can hold.
_UNITS = {2: 32639.0, 3: 8355000.0}
# Rows of an int4 weight that are dequantized at a time: at K = 768 one and a half MB of float32, which the
# second-level cache holds.
_DEQUANTIZED_ROWS = 512
# Numbers of a result that are worked on at once.
_WORK_SPACE = 1 << 23
# Numbers that are rounded at a time where there are more than twice as many: 1670 x 1536 take 0.79 ms, and
# 1.07 at once, whose passes and new pages go to memory; 1670 x 384 0.25 and 0.21.
_ROUNDED_AT_ONCE = 256 * 1536
# From here on two reductions take less than one of a new tensor of magnitudes: 0.061 ms for 0.109 at
# 480 x 1536, 0.021 for 0.020 at 480 x 384.
_LONG_ROW = 768


@dataclass(frozen=True)
class Instructions:
    """What of the processor the choice depends on.

    Attributes:
        int8: `torch._int_mm` is exact and fast: VNNI or AMX. (x86 without them adds pairs of products in 16
            bits, which overflow.)
        bfloat16: products of bfloat16 have instructions of their own.
        int4_tiles: the int4 kernel has the layout of `int4_tiles`.
    """

    int8: bool
    bfloat16: bool
    int4_tiles: bool


@dataclass(frozen=True)
class Choice:
    """How one call is computed.

    Attributes:
        face: "integers": rows of x quantized, then `torch._int_mm`; "digits": rows of x split into int8
            digits, then `torch._int_mm`; "int8-kernel", "int4-kernel": PyTorch's weight-only kernels;
            "dequantize": products in `computing`; "reference".
        digits: of "digits".
        rows: how many rows of x are worked on at a time.
        computing: of "dequantize".
    """

    face: Literal["integers", "digits", "int8-kernel", "int4-kernel", "dequantize", "reference"]
    digits: int = 0
    rows: int = 1 << 30
    computing: torch.dtype = torch.float32


def choose(packed: PackedWeight, dtype: torch.dtype, rows: int, machine: Instructions) -> Choice:
    """The fastest of the right ways to multiply so many rows of x.

    Times below are in ms on one core with AVX512-VNNI and AMX, for M rows of a layer K = 768, N = 3072.
    """
    scheme, out_features = packed.scheme, max(packed.out_features, 1)
    if scheme == "fp8" or dtype == torch.float64:
        return Choice("reference")
    computing = dtype if dtype == torch.bfloat16 and machine.bfloat16 else torch.float32
    # All rows at once, up to 32 MB of work space: 900 rows of a layer 384 x 1536 take 1.3 ms on two cores,
    # 1.7 in blocks of 512 and 2.0 in blocks of 192, whose results are copied.
    fitting = max(64, _WORK_SPACE // out_features)
    integers = machine.int8 and packed.in_features <= _LONGEST_INTEGER_SUM
    if scheme == "int8":
        # M = 1, 16, 128, 480: 0.24, 0.30, 0.82, 3.6, where float32 takes 0.33, 0.91, 3.5, 17.6.
        return Choice("integers", rows=fitting) if integers else Choice("dequantize")
    if scheme == "int4-weight":
        # With tiles, bfloat16, M = 1, 4, 16, 64: 0.11, 0.20, 0.85, 1.8; dequantized 1.5, 1.9, 2.1, 2.8; a
        # bfloat16 layer 0.29, 0.32, 0.33, 0.57. In float32 nothing but dequantizing is accurate.
        tiled = packed.layout != "plain" and machine.int4_tiles
        if tiled and dtype == torch.bfloat16 and rows <= 96:
            return Choice("int4-kernel")
        return Choice("dequantize", computing=computing)
    if dtype == torch.bfloat16 and rows <= 4 and not (packed.in_features % 64 or out_features % 64):
        # M = 1, 4, 8: 0.20, 0.23, 0.46; digits 0.36, 0.34, 0.37. The kernel has no code for what remains of
        # other sizes: it reads out of bounds.
        return Choice("int8-kernel")
    if not integers:
        return Choice("dequantize", computing=computing)
    if computing == torch.bfloat16 and rows > 48:
        # M = 64, 128, 480: 0.98, 1.2, 3.0; digits 1.0, 1.9, 12.
        return Choice("dequantize", computing=computing)
    digits = 3 if dtype == torch.float32 else 2
    if digits == 3 and packed.in_features < 512 and rows > 96:
        # Few products for each result: on two cores K = 384, N = 1536, M = 480, 900: 1.8, 3.2; digits 2.0,
        # 3.7; a float32 layer 1.6, 2.9.
        return Choice("dequantize")
    # On two cores M = 64, 128, 480, 900: 0.84, 1.4, 6.4, 8.9, where float32 takes 1.1, 1.8, 7.9, 12 and
    # dequantizing 1.9, 2.4, 8.8, 13.
    return Choice("digits", digits=digits, rows=max(64, fitting // digits))


@cache
def instructions() -> Instructions:
    """Those of this machine, asked once."""
    flags = cpu_flags()
    return Instructions(
        int8=bool(flags & {"avx512_vnni", "amx_int8"}) and _multiplies_integers_exactly(),
        bfloat16=bool(flags & {"avx512_bf16", "amx_bf16"}),
        int4_tiles=tiles_are_the_kernels(),
    )


def _multiplies_integers_exactly() -> bool:
    """Whether `torch._int_mm` is exact for the largest numbers: oneDNN may be kept from using VNNI
    (ONEDNN_MAX_CPU_ISA), or be missing.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    for rows, width, columns in ((1, 256, 64), (3, 33, 17), (64, 128, 64)):
        x = torch.full((rows, width), 127, dtype=torch.int8)
        weight = torch.full((columns, width), -127, dtype=torch.int8)
        x[:, ::3], weight[::2] = -128, 127
        exact = x.to(torch.float64) @ weight.to(torch.float64).t()
        if not torch.equal(torch._int_mm(x, weight.t()).to(torch.float64), exact):
            return False
    return True


def quantized_linear_cpu(
    x: Tensor, packed: PackedWeight, bias: Tensor | None, activation: str | None
) -> Tensor:
    """`quantized_linear_reference` without a gradient, in the fastest way."""
    rows = x.reshape(-1, packed.in_features)
    choice = choose(packed, x.dtype, rows.shape[0], instructions())
    if choice.face == "reference" or rows.numel() == 0:
        return quantized_linear_reference(x, packed, bias, activation)
    if packed.input_scales is not None:
        # In float32 even where x is not, unless only bfloat16 goes on.
        rows = rows / packed.input_scales
        if choice.face in ("int8-kernel", "int4-kernel"):
            rows = rows.to(x.dtype)
    wide_bias = None if bias is None else bias.to(torch.float32)
    if rows.shape[0] <= choice.rows:
        result = _activated(_product(rows, packed, wide_bias, choice), activation).to(x.dtype)
    else:
        result = x.new_empty(rows.shape[0], packed.out_features)
        for start in range(0, rows.shape[0], choice.rows):
            part = slice(start, start + choice.rows)
            result[part] = _activated(_product(rows[part], packed, wide_bias, choice), activation)
    return result.view(*x.shape[:-1], packed.out_features)


def quantized_linears_cpu(
    x: Tensor, packed: Sequence[PackedWeight], biases: Sequence[Tensor | None]
) -> list[Tensor] | None:
    """`quantized_linear_cpu` of one x by each weight, x quantized once; None where they do not share it."""
    rows = x.reshape(-1, packed[0].in_features)
    if rows.numel() == 0:
        return None
    for each in packed:
        choice = choose(each, x.dtype, rows.shape[0], instructions())
        if choice.face != "integers" or choice.rows < rows.shape[0] or each.input_scales is not None:
            return None
    numbers, scales = _quantized(rows)
    return [
        _integers(numbers, scales, each, None if bias is None else bias.to(torch.float32))
        .to(x.dtype)
        .view(*x.shape[:-1], each.out_features)
        for each, bias in zip(packed, biases, strict=True)
    ]


def _activated(product: Tensor, activation: str | None) -> Tensor:
    """In place on the product, which nobody else has."""
    if activation == "relu":
        return product.relu_()
    if activation == "silu":
        return silu(product, inplace=True)
    if activation is None:
        return product
    gelu: Tensor = torch.ops.aten.gelu_(product, approximate="tanh" if activation == "gelu_tanh" else "none")
    return gelu


def _product(rows: Tensor, packed: PackedWeight, bias: Tensor | None, choice: Choice) -> Tensor:
    """x @ W^T + bias, float32 [M, N], of rows already divided by `input_scales`."""
    if choice.face == "integers":
        return _integers(*_quantized(rows), packed, bias)
    product = (
        _digits(rows, packed, choice.digits) if choice.face == "digits" else _floats(rows, packed, choice)
    )
    return product if bias is None else product.add_(bias)


def _floats(rows: Tensor, packed: PackedWeight, choice: Choice) -> Tensor:
    """By a kernel of PyTorch's for few rows, or by the dequantized weight."""
    if packed.scheme == "int8":
        numbers, scales = _quantized(rows)
        product = linear(numbers.to(torch.float32), packed.values.to(torch.float32))
        return product.mul_(packed.scales.flatten()).mul_(scales)
    if choice.face == "int8-kernel":
        scales = packed.scales.flatten().to(torch.bfloat16)
        product = torch._weight_int8pack_mm(rows.contiguous(), packed.values, scales).to(torch.float32)
    elif choice.face == "int4-kernel":
        product = _int4_kernel(rows.contiguous(), packed)
    elif packed.scheme == "int8-weight":
        weight = packed.values.to(choice.computing).mul_(packed.scales.to(choice.computing))
        product = linear(rows.to(choice.computing), weight).to(torch.float32)
    elif packed.layout == "plain":
        product = _int4_dequantized(rows.to(choice.computing), packed)
    else:
        product = _int4_tiles_dequantized(rows.to(choice.computing), packed)
    # 0 for a row of finite numbers, else NaN.
    return product.add_(rows.mul(0.0).sum(-1, keepdim=True, dtype=torch.float32))


def _integers(numbers: Tensor, scales: Tensor, packed: PackedWeight, bias: Tensor | None) -> Tensor:
    """x @ W^T + bias of rows that `_quantized` rounded."""
    product = _as_floats(torch._int_mm(numbers, packed.values.t()))
    # The weight's scales first: before them a large row's product may overflow.
    product = product.mul_(packed.scales.flatten())
    return product.mul_(scales) if bias is None else torch.addcmul(bias, product, scales, out=product)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [M, K] and float32 [M, 1], as `quantize_rows`, without the passes that only NaN needs."""
    scales = _unit(rows, 127.0)
    if rows.numel() <= 2 * _ROUNDED_AT_ONCE:
        return rows.div(scales).round_().to(torch.int8), _nan_where_infinite(scales)
    numbers = torch.empty(rows.shape, dtype=torch.int8)
    step = max(1, _ROUNDED_AT_ONCE // rows.shape[1])
    space = torch.empty(step, rows.shape[1])
    for some, scale, result in zip(rows.split(step), scales.split(step), numbers.split(step), strict=True):
        result.copy_(torch.div(some, scale, out=space[: some.shape[0]]).round_())
    return numbers, _nan_where_infinite(scales)


def _as_floats(integers: Tensor) -> Tensor:
    """int32 as float32 in the same memory: what a new tensor of this size costs is its page faults."""
    return integers.view(torch.float32).copy_(integers)


def _unit(rows: Tensor, levels: float) -> Tensor:
    """What so many levels of each row's largest magnitude are worth, float32 [M, 1], never 0."""
    if rows.shape[1] < _LONG_ROW:
        magnitude = rows.abs().amax(-1, keepdim=True)
    else:
        magnitude = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_())
    return magnitude.to(torch.float32).div_(levels).clamp_min_(_TINY)


def _nan_where_infinite(scales: Tensor) -> Tensor:
    return scales + (scales - scales)


def _digits(rows: Tensor, packed: PackedWeight, digits: int) -> Tensor:
    """Rows as whole numbers of 16 or 24 bits, these as signed digits base 256, each digit's product with the
    weight exact in integers, and their sum in float32: as accurate as a product in float32.
    """
    unit = _unit(rows, _UNITS[digits])
    # Adding 128 to every digit makes them unsigned bytes; flipping each byte's highest bit takes 128 off.
    offset = 0x808080 if digits == 3 else 0x8080
    numbers = rows.div(unit).round_().to(torch.int32).add_(offset).bitwise_xor_(offset)
    by_digit = numbers.view(torch.int8).view(*rows.shape, 4).movedim(-1, 0)[:digits]
    stacked = by_digit.reshape(digits * rows.shape[0], rows.shape[1])
    products = _as_floats(torch._int_mm(stacked, packed.values.t()))
    *lower, product = products.view(digits, rows.shape[0], -1).unbind()
    for each in reversed(lower):
        product = torch.add(each, product, alpha=256.0)
    return product.mul_(packed.scales.flatten()).mul_(_nan_where_infinite(unit))


def _int4_kernel(rows: Tensor, packed: PackedWeight) -> Tensor:
    """PyTorch's kernel: (q - 8) * scale + zero, where scale and zero are bfloat16 [G, N, 2]."""
    assert packed.zero_points is not None
    factors = rows.new_empty(packed.scales.shape[1], packed.out_features, 2)
    factors[..., 0] = packed.scales.t()
    factors[..., 1] = torch.mul(8.0 - packed.zero_points, packed.scales).t()
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        rows, packed.values.view(torch.uint8), packed.group_size, factors
    )
    return product.to(torch.float32)


def _int4_dequantized(rows: Tensor, packed: PackedWeight) -> Tensor:
    """The product of the even columns and that of the odd ones, which lie in different bits; by blocks of the
    weight's rows.
    """
    assert packed.zero_points is not None
    width, size = packed.in_features, packed.group_size
    result = rows.new_empty(rows.shape[0], packed.out_features, dtype=torch.float32)
    halves = [rows[:, parity::2].contiguous() for parity in (0, 1)]
    for start in range(0, packed.out_features, _DEQUANTIZED_ROWS):
        part = slice(start, start + _DEQUANTIZED_ROWS)
        values = packed.values[part]
        shape: tuple[int, ...] = values.shape
        scales, zeros = packed.scales[part], packed.zero_points[part]
        if width % size:
            scales, zeros = (expand_groups(each, size // 2, shape[1]) for each in (scales, zeros))
        else:
            shape = (shape[0], -1, size // 2)
            scales, zeros = scales.unsqueeze(2), zeros.unsqueeze(2)
        product = None
        for half, numbers in zip(halves, (values & 15, values >> 4 & 15), strict=True):
            weight = numbers.to(torch.float32).view(shape).sub_(zeros).mul_(scales).to(rows.dtype)
            weight = weight.view(values.shape)[:, : half.shape[1]]
            product = linear(half, weight) if product is None else torch.addmm(product, half, weight.t())
        assert product is not None
        result[:, part] = product
    return result


def _int4_tiles_dequantized(rows: Tensor, packed: PackedWeight) -> Tensor:
    """The same of tiles [K, 32] of the transposed weight, some at a time."""
    assert packed.zero_points is not None
    count, half = packed.out_features // TILE_ROWS, TILE_ROWS // 2
    groups, size = packed.scales.shape[1], packed.group_size
    result = rows.new_empty(rows.shape[0], count, 2, half, dtype=torch.float32)
    step = _DEQUANTIZED_ROWS // TILE_ROWS
    # [tiles, halves, G, 1, 32]
    scales, zeros = (
        each.view(count, 2, half, groups).transpose(2, 3).unsqueeze(3)
        for each in (packed.scales, packed.zero_points)
    )
    for start in range(0, count, step):
        tiles = slice(start * TILE_ROWS, (start + step) * TILE_ROWS)
        for index, numbers in enumerate(tile_halves(packed.values[tiles], packed.in_features)):
            part = slice(start, start + step)
            weight = numbers.to(torch.float32).view(-1, groups, size, half)
            weight = weight.sub_(zeros[part, index]).mul_(scales[part, index]).to(rows.dtype)
            weight = weight.view(-1, packed.in_features, half)
            product = torch.matmul(rows, weight)
            result[:, part, index] = product.transpose(0, 1).to(torch.float32)
    return result.view(rows.shape[0], -1)
