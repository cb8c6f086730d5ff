"""Exported points of a sweep: a compressed model as ONNX graphs in a folder, opened in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import fastattn
from fastattn.bench.contenders.ort_graph import session_options
from fastattn.onnx.sources import exports_as
from fastattn.onnx.sources.copies import is_custom

__all__ = ["can_export", "exported"]

# What exporting takes, and optimum with requests for `fastattn.load` to open a model of transformers.
_PACKAGES = ("onnx", "onnxscript", "onnxruntime", "optimum", "requests")


def can_export(model: nn.Module) -> bool:
    """Whether a sweep tries exports of its own accord: the model is on the CPU and of a family that exports
    without example inputs, and all packages that takes are installed.
    """
    if next(model.parameters()).device.type != "cpu" or not all(map(find_spec, _PACKAGES)):
        return False
    try:
        exports_as(model, None)
    except ValueError:
        return False
    return True


def exported(
    model: nn.Module, given: str | Mapping[str, Any], place: Path, batch: Mapping[str, Tensor]
) -> tuple[Any, int]:
    """The model as `fastattn.export` writes it to `place` and `fastattn.load` opens it, and the bytes of its
    graphs and their weights.

    Args:
        given: a precision, or arguments of `fastattn.export`.
        batch: what a module of the user's own is traced with.

    Raises:
        TypeError, ValueError, ImportError, fastattn.VerificationError: as `fastattn.export`.
    """
    options = {"precision": given} if isinstance(given, str) else dict(given)
    result = fastattn.export(model, place, example_inputs=batch if is_custom(model) else None, **options)
    # As many threads as PyTorch has, like the benchmark's exports; that they spin on after a call is the
    # timer's concern, which lets them come to rest before the next contender's turn.
    return fastattn.load(place, session_options()), result.size_bytes
