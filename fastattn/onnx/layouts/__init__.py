"""What other loaders need beside an exported graph, each layout in a file of its own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.layouts.context import LayoutContext
from fastattn.onnx.targets import Target

__all__ = ["LayoutContext", "resolve_layouts", "write_layouts"]


def resolve_layouts(layouts: str | Iterable[str], source: Source, target: Target) -> tuple[str, ...]:
    """Names of the layouts to write.

    Raises:
        ValueError: an unknown layout, or one that cannot be had of this model or target.
    """
    return ()


def write_layouts(context: LayoutContext, wanted: Iterable[str]) -> None:
    """Write them into the staging folder."""
    raise NotImplementedError(str([*wanted, context.precision])) from None


_: Any = None
