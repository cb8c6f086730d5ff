"""What an adapter declares about an architecture, and the registry that finds the adapter of a module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from torch import nn

from fastattn.layers import FusedLayer

__all__ = ["KINDS", "Family", "Site", "families_in", "known_families"]

KINDS = ("attention", "residual_norm", "activation", "encoder")

# Module that defines an architecture's layers -> the adapter for it. An adapter is imported only once a model
# holds such a layer, so transformers is then loaded already.
_ADAPTERS = {"transformers.models.bert.modeling_bert": "fastattn.models.bert"}


@dataclass(frozen=True)
class Site:
    """A class of layer that can be swapped: what kind it is and what takes its place."""

    kind: str
    replacement: type[FusedLayer]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")


@dataclass(frozen=True)
class Family:
    """One architecture: its sites, and every class of attention layer it has."""

    name: str
    sites: tuple[Site, ...]
    attention: tuple[type[nn.Module], ...]


@cache
def _load(adapter: str) -> Family:
    family: Family = import_module(adapter).FAMILY
    return family


def known_families() -> tuple[str, ...]:
    """Names of the supported architectures, without loading their adapters."""
    return tuple(sorted(adapter.rpartition(".")[2] for adapter in _ADAPTERS.values()))


def families_in(model: nn.Module) -> tuple[Family, ...]:
    """The adapters of the layers in `model`, subclasses of known layers included."""
    origins = {base.__module__ for module in model.modules() for base in type(module).__mro__}
    return tuple(_load(adapter) for origin, adapter in _ADAPTERS.items() if origin in origins)
