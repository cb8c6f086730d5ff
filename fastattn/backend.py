"""Which implementation runs an operation: Triton kernels or PyTorch. The one place that decides."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["BACKENDS", "BackendError", "backend_for", "get_backend", "set_backend"]

BACKENDS = ("auto", "gluon", "triton", "torch")

_selected: ContextVar[str | None] = ContextVar("fastattn_backend", default=None)


class BackendError(RuntimeError):
    """The backend asked for cannot run here; the message names the reason and the way out."""


class _Selection(AbstractContextManager[None]):
    """What `set_backend` returns: used in a `with` statement, it puts the previous backend back at the
    end.
    """

    def __init__(self, token: Token[str | None]) -> None:
        self._token = token

    def __exit__(self, *exc_info: object) -> None:
        _selected.reset(self._token)


def _validate(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin} is {name!r}; it must be one of {', '.join(map(repr, BACKENDS))}")
    return name


def get_backend() -> str:
    """The backend selected in this context: `set_backend`'s, else the environment's `FASTATTN_BACKEND` as it
    was when first asked for, else "auto".
    """
    return _selected.get() or _backend_of_environment()


@cache
def _backend_of_environment() -> str:
    """Read once: every operation asks, and reading the environment takes as long as a small operation."""
    return _validate(os.environ.get("FASTATTN_BACKEND") or "auto", "FASTATTN_BACKEND")


def set_backend(name: str) -> AbstractContextManager[None]:
    """Select the backend of this context (thread or task); usable as a plain call or in a `with` statement.

    Args:
        name: "auto" (kernels on a GPU, PyTorch elsewhere), "triton", "gluon" or "torch".

    Raises:
        ValueError: `name` is none of these.
        BackendError: the backend cannot run on this machine; the message names the reason.

    Example:
        >>> import fastattn
        >>> with fastattn.set_backend("torch"):
        ...     pass
    """
    _validate(name, "backend")
    reason = _unavailable_reason(name)
    if reason:
        raise BackendError(f'backend {name!r} cannot be used: {reason}; use "auto" or "torch"')
    return _Selection(_selected.set(name))


@cache
def _triton_importable() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter (`TRITON_INTERPRET=1`), which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _unavailable_reason(name: str) -> str | None:
    if name == "gluon":
        return "this version has no Gluon kernels"
    if name != "triton":
        return None
    if not _triton_importable():
        return "triton is not installed"
    if interpreting():
        return None
    import torch

    return None if torch.cuda.is_available() else "no CUDA or ROCm device is visible to torch"


def backend_for(device: torch.device) -> str:
    """The backend that runs an operation on tensors of `device`: "triton" or "torch".

    Raises:
        BackendError: "triton" or "gluon" was asked for and cannot run on `device`.
    """
    selected = get_backend()
    if selected == "torch":
        return "torch"
    if device.type == "cuda" and _triton_importable():
        if selected == "gluon":
            raise BackendError(f"backend 'gluon' cannot be used: {_unavailable_reason('gluon')}")
        return "triton"
    if selected == "auto":
        return "torch"
    reason = _unavailable_reason(selected)
    if reason is None and device.type == "cpu" and interpreting():
        return "triton"
    raise BackendError(
        f"backend {selected!r} cannot run on a tensor of device {device}: "
        f'{reason or "Triton kernels need a GPU tensor"}; use "auto" or "torch"'
    )
