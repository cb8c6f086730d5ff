"""The borders between swapped layers that follow one another in a model."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from torch import nn

from fastattn.layers import Border, FusedRMSNorm, ResidualLayer

__all__ = ["link_layers", "unlink"]

_RESIDUAL = ("fastattn_before", "fastattn_after", "fastattn_next")
_PACKED = ("fastattn_packed_before", "fastattn_packed_after")


def link_layers(model: nn.Module) -> None:
    """Put a border between every two swapped layers that follow one another, and after the last one where a
    norm follows.

    Neighbours in a list are taken for neighbours in the forward. Where that is wrong nothing is: what is
    handed over is used only by a layer that is given the very tensor it belongs to.
    """
    for owner, layers in _stacks(model):
        regions = [each for each in layers if hasattr(each, "fastattn_packed_before")]
        if len(regions) == len(layers):
            after_all = [each for each in owner.children() if hasattr(each, "fastattn_packed_before")]
            for first, second in pairwise([*regions, *after_all]):
                border = Border()
                _set(first, fastattn_packed_after=border)
                _set(second, fastattn_packed_before=border)
        for group, after in _runs(layers, owner):
            for first, second in pairwise([*group, *after]):
                norm = second.entry_norm if isinstance(second, ResidualLayer) else second
                if norm is not None:
                    border = Border()
                    _set(first, fastattn_after=border, fastattn_next=(norm,))
                    _set(second, fastattn_before=border)


def unlink(module: nn.Module) -> None:
    for name in (*_RESIDUAL, *_PACKED):
        module.__dict__.pop(name, None)


def _set(module: nn.Module, **values: Any) -> None:
    # Not as attributes of a module: a norm would be registered as this layer's submodule.
    module.__dict__.update(values)


def _stacks(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """Every list of layers, with the module that owns it; a list inside a layer of a list is the layer's."""
    inner: set[int] = set()
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and id(child) not in inner:
                inner.update(id(each) for each in child.modules())
                yield owner, list(child)


def _runs(layers: list[nn.Module], owner: nn.Module) -> Iterator[tuple[list[nn.Module], list[nn.Module]]]:
    """Unbroken runs of residual layers (a layer may hold several, as T5's do) and the norm after each."""
    run: list[nn.Module] = []
    for layer in layers:
        found = [each for each in layer.modules() if isinstance(each, ResidualLayer)]
        if not found and run:
            yield run, []
            run = []
        run += found
    norms: list[nn.Module] = [each for each in owner.children() if isinstance(each, FusedRMSNorm)]
    if run:
        yield run, norms if len(norms) == 1 else []
