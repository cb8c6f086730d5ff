"""HQQ: four-bit groups whose zero points leave the least error, found from the weight alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops import PackedWeight, pack_int4
from fastattn.ops.packed_weight import GROUP_SIZES, expand_groups, groups_of

__all__ = ["int4_grid", "quantize_hqq"]

# Badri and Shaji's constants: the error is taken to the power 0.7, so that a few large ones, the outliers',
# count for less than in a square.
_POWER = 0.7
_FIRST_PENALTY = 10.0
_PENALTY_GROWTH = 1.01
_STEPS = 20
# Elements worked on at once. On a CPU the five float32 temporaries stay in its cache: twice as fast as with
# four million. Elsewhere they are few enough to be bounded, and enough to fill a GPU: 320 MB.
_CPU_CHUNK = 1 << 16
_CHUNK = 1 << 24


def quantize_hqq(weight: Tensor, group_size: int = 64) -> PackedWeight:
    """A weight in four-bit groups, by half-quadratic quantization (Badri and Shaji, "Half-Quadratic
    Quantization of Large Machine Learning Models", 2023): no calibration data.

    Each group's scale spans its values; its zero point is moved, alternating with a sparse part that takes up
    the outliers' error, to where the error's 0.7-th power is least.

    Args:
        weight: [N, K], floating point.
        group_size: 32, 64 or 128 columns.

    Returns:
        scheme "int4-weight", on the weight's device.

    Raises:
        TypeError: a weight that is not floating point.
        ValueError: another rank, values that are not finite, or another group size.

    Example:
        >>> import torch
        >>> weight = torch.randn(4, 64)
        >>> packed = quantize_hqq(weight, group_size=32)
        >>> bool((packed.dequantize() - weight).abs().max() < 0.5)
        True
    """
    if not weight.is_floating_point():
        raise TypeError(f"quantize_hqq: weight is {weight.dtype}; it must be floating point")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"quantize_hqq: weight must be [N, K], not empty; got {list(weight.shape)}")
    if not bool(weight.isfinite().all()):
        raise ValueError("quantize_hqq: weight has values that are not finite")
    rows, columns = weight.shape
    scales, zero_points = int4_grid(weight, group_size)
    integers = torch.empty(rows, columns, dtype=torch.uint8, device=weight.device)
    for part in _row_chunks(weight):
        scale = expand_groups(scales[part], group_size, columns)
        zero_point = expand_groups(zero_points[part], group_size, columns)
        numbers = weight[part].detach().float() / scale + zero_point
        integers[part] = numbers.round_().clamp_(0, 15).to(torch.uint8)
    return PackedWeight(pack_int4(integers), scales, "int4-weight", columns, group_size, zero_points)


def int4_grid(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """HQQ's scales and zero points of every group of `weight`, float32 [N, ceil(K / group_size)] each.

    Raises:
        ValueError: no such group size.
    """
    if group_size not in GROUP_SIZES:
        raise ValueError(f"group_size is {group_size}; accepted are {', '.join(map(str, GROUP_SIZES))}")
    rows, columns = weight.shape
    groups = groups_of(columns, group_size)
    scales = torch.empty(rows, groups, device=weight.device)
    zero_points = torch.empty_like(scales)
    for part in _row_chunks(weight):
        wide = weight[part].detach().float()
        # A short last group is filled with its last column: no value its range does not have already.
        missing = groups * group_size - columns
        wide = torch.cat([wide, wide[:, -1:].expand(-1, missing)], dim=1)
        grid = _solve(wide.view(-1, groups, group_size))
        scales[part], zero_points[part] = grid
    return scales, zero_points


def _row_chunks(weight: Tensor) -> list[slice]:
    step = max(1, (_CPU_CHUNK if weight.device.type == "cpu" else _CHUNK) // weight.shape[1])
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _solve(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zero points [n, G] of groups [n, G, size]."""
    low, high = weight.aminmax(dim=2, keepdim=True)
    scale = (high - low) / 15
    # A group of one value: any scale does; its zero point alone represents the value.
    scale = torch.where(scale > torch.finfo(torch.float32).tiny * 16, scale, high.abs().clamp(min=1.0))
    zero_point = -low / scale
    best, least = zero_point, torch.full_like(zero_point, torch.inf)
    penalty = _FIRST_PENALTY
    for _ in range(_STEPS + 1):
        integers = (weight / scale + zero_point).round_().clamp_(0, 15)
        error = weight - (integers - zero_point) * scale
        magnitude = error.abs().clamp_(min=torch.finfo(torch.float32).tiny)
        # One power for both: it is most of the time.
        slope = magnitude.pow(_POWER - 1)
        loss = (magnitude * slope).mean(dim=2, keepdim=True)
        better = loss < least
        best, least = torch.where(better, zero_point, best), torch.where(better, loss, least)
        # The sparse part: a shrinkage of the error (the proximal operator of the power, approximately).
        shrunk = magnitude.sub_(slope.div_(penalty)).clamp_(min=0).mul_(error.sign())
        zero_point = (integers - (weight - shrunk) / scale).mean(dim=2, keepdim=True)
        penalty *= _PENALTY_GROWTH
    return scale.squeeze(2), best.squeeze(2)
