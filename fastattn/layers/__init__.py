"""Layers built from the operations: what adapters swap into models."""

from fastattn.layers.fused import FusedActivation, FusedLayer, FusedResidualNorm, project
from fastattn.layers.plain import is_observed, is_plain, modules_below

__all__ = [
    "FusedActivation",
    "FusedLayer",
    "FusedResidualNorm",
    "is_observed",
    "is_plain",
    "modules_below",
    "project",
]
