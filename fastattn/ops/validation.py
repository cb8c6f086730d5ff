"""Checks of arguments shared by the operations: a clear error naming what was given and what is accepted."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

__all__ = [
    "autocast",
    "check_device",
    "check_dropout",
    "check_same",
    "is_traced",
    "may_read",
    "shape_of",
    "shapes_of",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def shape_of(x: Tensor) -> str:
    return str(list(x.shape))


def shapes_of(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {shape_of(query)}, key {shape_of(key)}, value {shape_of(value)}"


def check_same(op: str, first: str, reference: Tensor, name: str, other: Tensor) -> None:
    """Raise unless `other` has the dtype, a floating one, and the device of `reference`, called `first`."""
    if reference.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"{op}: {first} is {reference.dtype}; accepted are float16, bfloat16, float32 and float64"
        )
    if other.dtype != reference.dtype:
        raise TypeError(f"{op}: {name} is {other.dtype} but {first} is {reference.dtype}; they must agree")
    check_device(op, first, reference, name, other)


def check_device(op: str, first: str, reference: Tensor, name: str, other: Tensor) -> None:
    if other.device != reference.device:
        raise ValueError(
            f"{op}: {name} is on {other.device} but {first} is on {reference.device}; move one of them"
        )


def check_dropout(op: str, dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it must lie in [0, 1]")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the active autocast dtype; as they are where autocast is off. float64 is left alone, as
    PyTorch does.
    """
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def is_traced(x: Tensor) -> bool:
    """Whether the values of `x` cannot be read now: compile or export is tracing, a CUDA graph is captured,
    or `x` is fake.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or (torch._C._len_torch_dispatch_stack() > 0 and not _is_only_watched())
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _is_only_watched() -> bool:
    """Whether every dispatch mode says that it runs operations as they are, on the values they have."""
    modes = _get_current_dispatch_mode_stack()
    return all(getattr(mode, "fastattn_only_watches", False) for mode in modes)


def may_read(x: Tensor) -> bool:
    """Whether a check may read the values of `x`: not while tracing, and on a GPU, where that stalls the
    stream, only in debug mode (FASTATTN_DEBUG=1).
    """
    return not is_traced(x) and (x.device.type == "cpu" or os.environ.get("FASTATTN_DEBUG") == "1")
