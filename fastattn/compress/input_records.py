"""What is kept of a layer's inputs while batches go by: magnitudes, second moments or some of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["RECORDS", "InputRecord"]

# Rows kept of a layer: enough for a relative error to within a few hundredths of itself.
_ROWS = 256


class InputRecord(ABC):
    """One layer's inputs, shown in parts. `count` is how many there were."""

    count = 0

    def add(self, rows: Tensor) -> None:
        """Take in inputs [R, K], float32."""
        self._take(rows)
        self.count += rows.shape[0]

    @abstractmethod
    def _take(self, rows: Tensor) -> None: ...

    @abstractmethod
    def result(self) -> Tensor:
        """What is kept, float32; only after rows came."""

    @staticmethod
    @abstractmethod
    def nbytes(in_features: int) -> int:
        """What one record of a layer with K inputs holds, in bytes."""


class _AbsMax(InputRecord):
    """The largest magnitude of each input, [K]."""

    _largest: Tensor | None = None

    def _take(self, rows: Tensor) -> None:
        if rows.shape[0]:
            largest = rows.abs().amax(dim=0)
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def result(self) -> Tensor:
        assert self._largest is not None
        return self._largest

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 4 * in_features


class _Hessian(InputRecord):
    """The mean of x x^T over the inputs, [K, K]."""

    _mean: Tensor | None = None

    def _take(self, rows: Tensor) -> None:
        if self._mean is None:
            self._mean = rows.new_zeros(rows.shape[1], rows.shape[1])
        total = max(self.count + rows.shape[0], 1)
        self._mean.addmm_(rows.T, rows, beta=self.count / total, alpha=1 / total)

    def result(self) -> Tensor:
        assert self._mean is not None
        return self._mean

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 4 * in_features * in_features


class _Rows(InputRecord):
    """Up to 256 of the inputs, [R, K]: every row draws a number, and those of the smallest stay."""

    def __init__(self) -> None:
        # Its own: drawing leaves the caller's random numbers as they are, and repeats.
        self._generator = torch.Generator().manual_seed(0)
        self._rows: Tensor | None = None
        self._draws = torch.empty(0)

    def _take(self, rows: Tensor) -> None:
        draws = torch.rand(rows.shape[0], generator=self._generator)
        if self._rows is not None:
            rows, draws = torch.cat([self._rows, rows]), torch.cat([self._draws, draws])
        kept = draws.argsort()[:_ROWS].sort().values
        # Indexing copies: a view would keep the whole batch alive.
        self._rows, self._draws = rows[kept.to(rows.device)], draws[kept]

    def result(self) -> Tensor:
        assert self._rows is not None
        return self._rows

    @staticmethod
    def nbytes(in_features: int) -> int:
        return 4 * _ROWS * in_features


RECORDS: dict[str, type[InputRecord]] = {"absmax": _AbsMax, "hessian": _Hessian, "rows": _Rows}
