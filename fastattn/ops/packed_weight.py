"""The quantized weight of a linear layer: its integers (or float8 numbers), their scales, and the packing of
four-bit integers. `quantized_linear` multiplies by it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastattn.ops.int4_tiles import TILE_ROWS, TILED, tiled, tiles_are_the_kernels, untiled

__all__ = [
    "GROUP_SIZES",
    "SCHEMES",
    "PackedWeight",
    "expand_groups",
    "groups_of",
    "pack_int4",
    "plain",
    "prepare",
    "quantize_absmax",
    "unpack_int4",
]

SCHEMES = ("int8", "int8-weight", "int4-weight", "fp8")
GROUP_SIZES = (32, 64, 128)
FLOAT8_MAX = 448.0  # of float8_e4m3fn
_VALUE_DTYPES = {
    "int8": torch.int8,
    "int8-weight": torch.int8,
    "int4-weight": torch.int8,
    "fp8": torch.float8_e4m3fn,
}


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight of a linear layer with K inputs and N outputs: `W ~ (q - zero_points) * scales`, by
    row and group of `group_size` columns.

    Args:
        values: "int8" and "int8-weight": int8 [N, K] of -127 to 127; "int4-weight": int8 [N, ceil(K / 2)],
            two integers q of 0 to 15 a byte, the even column in the low four bits; "fp8": float8_e4m3fn
            [N, K].
        scales: float32 [N, G], G = ceil(K / group_size); the last group may be short.
        scheme: "int8" (the rows of the input are quantized, too), "int8-weight", "int4-weight" or "fp8" (the
            rows of the input are quantized, too).
        in_features: K.
        group_size: 32, 64 or 128 for "int4-weight"; K, a row being one group, for the others.
        zero_points: "int4-weight" alone, and needed there: float32 [N, G], not always whole numbers.
        input_scales: float32 [K] or None: the input is divided by it before anything else (Xiao et al.,
            "SmoothQuant", 2022, where no norm before the layer takes the division).
        layout: how `values` lies in memory: "plain", as said above, or what `prepare` made of it.

    Raises:
        TypeError: tensors of other dtypes.
        ValueError: an unknown scheme or group size, or shapes or devices that do not fit.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.quantize_absmax(torch.eye(4), "int8")
        >>> packed.dequantize()[0]
        tensor([1., 0., 0., 0.])
        >>> packed.nbytes
        32
    """

    values: Tensor
    scales: Tensor
    scheme: str
    in_features: int
    group_size: int
    zero_points: Tensor | None = None
    input_scales: Tensor | None = None
    layout: str = "plain"

    def __post_init__(self) -> None:
        _check_scheme("PackedWeight", self.scheme, self.group_size, self.in_features)
        if self.values.dtype != _VALUE_DTYPES[self.scheme] or self.values.dim() != 2:
            raise TypeError(
                f"PackedWeight: values of {self.scheme!r} must be {_VALUE_DTYPES[self.scheme]} of two "
                f"dimensions; got {self.values.dtype} {list(self.values.shape)}"
            )
        if self.layout != "plain" and not (
            self.layout == TILED
            and self.scheme == "int4-weight"
            and can_tile(self.out_features, self.in_features, self.group_size)
        ):
            raise ValueError(
                f"PackedWeight: layout is {self.layout!r}; accepted are 'plain' and, for 'int4-weight' with "
                f"N a multiple of {TILE_ROWS} and K of group_size, {TILED!r}"
            )
        columns = -(-self.in_features // 2) if self.scheme == "int4-weight" else self.in_features
        if self.values.shape[1] != columns:
            raise ValueError(
                f"PackedWeight: values of {self.scheme!r} with {self.in_features} inputs must be "
                f"[N, {columns}]; got {list(self.values.shape)}"
            )
        if (self.zero_points is None) == (self.scheme == "int4-weight"):
            raise ValueError(
                f"PackedWeight: zero_points belong to 'int4-weight' and are needed there; scheme is "
                f"{self.scheme!r} and zero_points {'None' if self.zero_points is None else 'a tensor'}"
            )
        groups = (self.values.shape[0], groups_of(self.in_features, self.group_size))
        for name, tensor, shape in (
            ("scales", self.scales, groups),
            ("zero_points", self.zero_points, groups),
            ("input_scales", self.input_scales, (self.in_features,)),
        ):
            if tensor is None:
                continue
            if tensor.dtype != torch.float32:
                raise TypeError(f"PackedWeight: {name} must be torch.float32; got {tensor.dtype}")
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"PackedWeight: {name} must be {list(shape)} for values {list(self.values.shape)} in "
                    f"groups of {self.group_size}; got {list(tensor.shape)}"
                )
            if tensor.device != self.values.device:
                raise ValueError(
                    f"PackedWeight: {name} is on {tensor.device} but values on {self.values.device}"
                )

    @property
    def out_features(self) -> int:
        """N."""
        return self.values.shape[0]

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.values, self.scales, self.zero_points, self.input_scales)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)

    def integers(self) -> Tensor:
        """The quantized numbers [N, K]: int8 of -127 to 127, uint8 of 0 to 15 for "int4-weight".

        Raises:
            ValueError: "fp8", which has none.
        """
        if self.scheme == "fp8":
            raise ValueError("PackedWeight.integers: scheme 'fp8' holds float8 numbers, no integers")
        if self.scheme == "int4-weight":
            return unpack_int4(plain(self).values, self.in_features)
        return self.values

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [N, K] that the layer's own input is multiplied by (so divided by `input_scales`, where
        there are any), computed in float32, or float64 where `dtype` is, then cast.
        """
        weight = self.stored_weight(torch.float64 if dtype == torch.float64 else torch.float32)
        return (weight if self.input_scales is None else weight / self.input_scales).to(dtype)

    def stored_weight(self, dtype: torch.dtype) -> Tensor:
        """`(q - zero_points) * scales` [N, K], what the input divided by `input_scales` is multiplied by."""
        numbers = (self.values if self.scheme == "fp8" else self.integers()).to(dtype)
        if self.zero_points is not None:
            numbers = numbers - expand_groups(self.zero_points, self.group_size, self.in_features)
        return numbers * expand_groups(self.scales, self.group_size, self.in_features)

    def to(self, device: torch.device | str | int) -> PackedWeight:
        """The same weight with its tensors on `device`; dtypes do not change."""
        return replace(
            self,
            values=self.values.to(device),
            scales=self.scales.to(device),
            zero_points=None if self.zero_points is None else self.zero_points.to(device),
            input_scales=None if self.input_scales is None else self.input_scales.to(device),
        )


def can_tile(out_features: int, in_features: int, group_size: int) -> bool:
    """Whether an int4 weight of this shape divides into the tiles of `prepare`."""
    return group_size in GROUP_SIZES and not (out_features % TILE_ROWS or in_features % group_size)


def prepare(packed: PackedWeight) -> PackedWeight:
    """`packed` in the layout that this machine multiplies fastest: of as many bytes, and `plain` is its exact
    inverse.

    That is the tiled layout of PyTorch's int4 kernel for bfloat16 rows, where the weight lies on a CPU that
    has it and divides into tiles; everything else stays as it is.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.quantize_absmax(torch.randn(64, 128), "int4-weight")
        >>> prepared = fastattn.ops.prepare(packed)
        >>> torch.equal(fastattn.ops.plain(prepared).values, packed.values)
        True
    """
    if (
        packed.scheme != "int4-weight"
        or packed.layout != "plain"
        or packed.device.type != "cpu"
        or not can_tile(packed.out_features, packed.in_features, packed.group_size)
        or not tiles_are_the_kernels()
    ):
        return packed
    return replace(packed, values=tiled(packed.values, packed.in_features), layout=TILED)


def plain(packed: PackedWeight) -> PackedWeight:
    """`packed` in the layout that `PackedWeight` documents, bit for bit what `prepare` was given.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.quantize_absmax(torch.randn(3, 5), "int8")
        >>> fastattn.ops.plain(packed) is packed
        True
    """
    if packed.layout == "plain":
        return packed
    return replace(packed, values=untiled(packed.values, packed.in_features), layout="plain")


def groups_of(in_features: int, group_size: int) -> int:
    """How many groups a row of `in_features` columns has; the last may be short."""
    return -(-in_features // group_size)


def expand_groups(by_group: Tensor, group_size: int, in_features: int) -> Tensor:
    """[N, G], a value a group, as [N, K], its value for every column; [N, 1] where a row is one group."""
    if by_group.shape[1] == 1:
        return by_group
    return by_group.repeat_interleave(group_size, dim=1)[:, :in_features]


def pack_int4(integers: Tensor) -> Tensor:
    """Integers of 0 to 15 two to a byte, the even column in the low four bits.

    Args:
        integers: uint8 [N, K], each 0 to 15.

    Returns:
        int8 [N, ceil(K / 2)]; the high bits of an odd K's last byte are 0.

    Raises:
        TypeError: another dtype.
        ValueError: another rank, or integers above 15.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.pack_int4(torch.tensor([[1, 2, 15]], dtype=torch.uint8))
        >>> packed
        tensor([[33, 15]], dtype=torch.int8)
        >>> fastattn.ops.unpack_int4(packed, 3)
        tensor([[ 1,  2, 15]], dtype=torch.uint8)
    """
    if integers.dtype != torch.uint8:
        raise TypeError(f"pack_int4: integers are {integers.dtype}; they must be torch.uint8")
    if integers.dim() != 2:
        raise ValueError(f"pack_int4: integers must be [N, K]; got {list(integers.shape)}")
    if integers.numel() and not integers.is_meta and int(integers.max()) > 15:
        raise ValueError(f"pack_int4: integers must be 0 to 15; the largest is {int(integers.max())}")
    packed = integers[:, 0::2].clone()
    packed[:, : integers.shape[1] // 2].bitwise_or_(integers[:, 1::2] << 4)
    return packed.view(torch.int8)


def unpack_int4(values: Tensor, in_features: int) -> Tensor:
    """The integers that `pack_int4` packed: its exact inverse.

    Args:
        values: int8 [N, ceil(K / 2)].
        in_features: K.

    Returns:
        uint8 [N, K], each 0 to 15.

    Raises:
        TypeError: another dtype.
        ValueError: another shape.

    Example:
        >>> import torch, fastattn
        >>> fastattn.ops.unpack_int4(torch.tensor([[33, 15]], dtype=torch.int8), 4)
        tensor([[ 1,  2, 15,  0]], dtype=torch.uint8)
    """
    if values.dtype != torch.int8:
        raise TypeError(f"unpack_int4: values are {values.dtype}; they must be torch.int8")
    if values.dim() != 2 or values.shape[1] != -(-in_features // 2):
        raise ValueError(
            f"unpack_int4: values must be [N, {-(-in_features // 2)}] for {in_features} columns; "
            f"got {list(values.shape)}"
        )
    unsigned = values.view(torch.uint8)
    columns = torch.stack((unsigned & 15, unsigned >> 4), dim=-1)
    return columns.reshape(values.shape[0], -1)[:, :in_features].contiguous()


def quantize_absmax(weight: Tensor, scheme: str, group_size: int | None = None) -> PackedWeight:
    """A weight rounded to the nearest numbers of `scheme`, its scales set by the largest magnitude of each
    row (or group).

    Symmetric about zero. int8 uses -127 to 127. int4 uses all sixteen integers: the element of largest
    magnitude becomes -8 (so a scale may be negative), which leaves 1/8 less error than -7 to 7 would.

    Args:
        weight: [N, K], floating point.
        scheme: "int8", "int8-weight", "int4-weight" or "fp8".
        group_size: "int4-weight" alone: 32, 64 (the default) or 128 columns.

    Returns:
        the weight, its tensors on `weight`'s device.

    Raises:
        TypeError: a weight that is not floating point.
        ValueError: a weight of another rank or with values that are not finite, an unknown scheme, or a group
            size the scheme does not take.

    Example:
        >>> import torch, fastattn
        >>> packed = fastattn.ops.quantize_absmax(torch.tensor([[0.5, -1.0, 0.25]]), "int8")
        >>> packed.values
        tensor([[  64, -127,   32]], dtype=torch.int8)
    """
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        given = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"quantize_absmax: weight is {given}; it must be a floating-point tensor")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"quantize_absmax: weight must be [N, K], not empty; got {list(weight.shape)}")
    in_features = weight.shape[1]
    if group_size is None:
        group_size = 64 if scheme == "int4-weight" else in_features
    _check_scheme("quantize_absmax", scheme, group_size, in_features)
    wide = weight.detach().to(torch.float32)
    if not wide.is_meta and not bool(wide.isfinite().all()):
        raise ValueError("quantize_absmax: weight has values that are not finite in float32")
    if scheme == "int4-weight":
        return _quantize_int4(wide, group_size)
    largest = wide.abs().amax(dim=1, keepdim=True)
    # Of a row of zeros (or of magnitudes that float32 cannot divide) every scale gives zeros.
    scales = largest / (FLOAT8_MAX if scheme == "fp8" else 127.0)
    scales = torch.where(scales >= torch.finfo(torch.float32).tiny, scales, 1.0)
    numbers = wide / scales
    if scheme == "fp8":
        values = numbers.clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
    else:
        values = numbers.round_().clamp_(-127, 127).to(torch.int8)
    return PackedWeight(values, scales, scheme, in_features, group_size)


def _quantize_int4(weight: Tensor, group_size: int) -> PackedWeight:
    rows, in_features = weight.shape
    groups = groups_of(in_features, group_size)
    padded = torch.nn.functional.pad(weight, (0, groups * group_size - in_features))
    padded = padded.view(rows, groups, group_size)
    extreme = padded.gather(2, padded.abs().argmax(dim=2, keepdim=True))
    scales = extreme / -8.0
    scales = torch.where(scales.abs() >= torch.finfo(torch.float32).tiny, scales, 1.0)
    integers = (padded / scales).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
    integers = integers.view(rows, -1)[:, :in_features]
    scales = scales.view(rows, groups)
    return PackedWeight(
        pack_int4(integers),
        scales,
        "int4-weight",
        in_features,
        group_size,
        zero_points=torch.full_like(scales, 8.0),
    )


def _check_scheme(name: str, scheme: str, group_size: int, in_features: int) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"{name}: scheme is {scheme!r}; accepted are {', '.join(map(repr, SCHEMES))}")
    if scheme == "int4-weight" and group_size not in GROUP_SIZES:
        raise ValueError(f"{name}: group_size of 'int4-weight' is {group_size}; accepted are {GROUP_SIZES}")
    if scheme != "int4-weight" and group_size != in_features:
        raise ValueError(
            f"{name}: group_size is {group_size}; {scheme!r} has one scale a row, so it must be "
            f"{in_features}, the row's length"
        )
