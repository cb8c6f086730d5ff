"""BERT's layers, and those of architectures that have them under names of their own: one call makes an
adapter.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn

from fastattn.layers import FusedActivation, FusedLayer, FusedResidualNorm
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion
from fastattn.models.self_attention import FusedSelfAttention

__all__ = ["bert_shaped", "replacement"]

_LAYERS: tuple[tuple[str, str, type[FusedLayer]], ...] = (
    ("attention", "SelfAttention", FusedSelfAttention),
    ("residual_norm", "SelfOutput", FusedResidualNorm),
    ("activation", "Intermediate", FusedActivation),
    ("residual_norm", "Output", FusedResidualNorm),
    ("encoder", "Encoder", PackedRegion),
)


def replacement(
    adapter: str, mixin: type[FusedLayer], original: type[nn.Module], **attributes: Any
) -> type[FusedLayer]:
    """The class that takes `original`'s place, under its name in the module `adapter`, where pickle looks.

    Sharding policies and `_no_split_modules` match classes by name.

    Args:
        adapter: `__name__` of the adapter.
        mixin: what is done in place of the original.
        original: transformers' class.
        attributes: the names under which the original has what the mixin reads.
    """
    name = original.__name__
    body = {"__module__": adapter, "fastattn_original": original, **attributes}
    made = type(name, (mixin, original), body)
    setattr(sys.modules[adapter], name, made)
    return made


def bert_shaped(adapter: str, modeling: ModuleType, prefix: str, attention: str) -> Family:
    """The family of layers that are BERT's, copied with `prefix` for "Bert".

    Args:
        adapter: `__name__` of the adapter, in which the replacements can be found afterwards.
        modeling: transformers' module that defines the layers.
        attention: in words, as `Family` has it.
    """
    sites = tuple(
        Site(kind, replacement(adapter, mixin, getattr(modeling, prefix + suffix)))
        for kind, suffix, mixin in _LAYERS
    )
    return Family(name=adapter.rpartition(".")[2], attention=attention, sites=sites)
