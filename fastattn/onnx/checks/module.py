"""The exported file of a user's own module in ONNX Runtime against that module in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.onnx.graph_spec import GraphSpec, Source
from fastattn.verification import CaseResult
from fastattn.verification.comparison import compare_outputs, named_tensors
from fastattn.verification.subject import masks_of

__all__ = ["results"]

_NAMES = ("batch", "sequence")
Run = Callable[..., Mapping[str, Tensor]]
Dimensions = Mapping[str, tuple[str | int, ...]]


def results(
    run: Run, source: Source, dimensions: Dimensions, bounds: Mapping[str, int]
) -> Iterator[CaseResult]:
    """Compared with the module swapped at every position, and as it was at real ones, on the example in other
    sizes.
    """
    (spec,) = source.graphs
    for case, batch in _batches(spec, dimensions, bounds):
        with torch.no_grad():
            try:
                expected = _named(spec, source.fused(**batch))
            except (RuntimeError, IndexError, ValueError):
                if case == "the example":
                    raise
                continue  # A size the module itself does not take.
            original = _named(spec, source.reference(**batch))
        found = run(**batch)
        yield from compare_outputs(f"{case}, swapped", found, expected, None)
        mask = masks_of(batch)("")
        if mask is not None or not any(x.dtype == torch.bool for x in batch.values()):
            yield from compare_outputs(case, found, original, mask)


def _named(spec: GraphSpec, result: Any) -> dict[str, Tensor]:
    return dict(zip(spec.outputs, named_tensors(result).values(), strict=True))


def _batches(
    spec: GraphSpec, dimensions: Dimensions, bounds: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The example, and its rows and columns repeated or left out to other sizes."""
    example: dict[str, int] = {}
    for name, tensor in spec.inputs.items():
        for size, dimension in zip(tensor.shape, dimensions[name], strict=True):
            if isinstance(dimension, str):
                example.setdefault(dimension, size)
    batch, length = (example.get(name, 2) for name in _NAMES)
    cases = {
        "the example": (batch, length),
        "one row": (1, length),
        "more rows": (batch + 3, length),
        "shorter": (batch, max(2, length // 2)),
        "longer": (batch, min(2 * length + 1, bounds.get("sequence", 2 * length + 1))),
        "batch == length": (min(batch, length), min(batch, length)),
        "length 1": (batch, 1),
    }
    for case, sizes in cases.items():
        wanted = {**example, **dict(zip(_NAMES, sizes, strict=True))}
        yield case, {name: _resized(x, dimensions[name], wanted) for name, x in spec.inputs.items()}


def _resized(tensor: Tensor, dimensions: tuple[str | int, ...], sizes: Mapping[str, int]) -> Tensor:
    for index, dimension in enumerate(dimensions):
        if isinstance(dimension, str) and dimension in sizes:
            rows = torch.arange(sizes[dimension]) % tensor.shape[index]
            tensor = tensor.index_select(index, rows)
    return tensor.contiguous()
