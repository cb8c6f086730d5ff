"""What every task has: inputs, a right answer that is computed once, and what an answer may lose."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders.runner import Runner
from fastattn.bench.contenders.source import DTYPES, Kind
from fastattn.bench.parity import FP32_TOLERANCE, Parity, precision_tolerance
from fastattn.bench.timing import Prepared
from fastattn.bench.workloads import Workload

__all__ = ["Work"]


class Work(ABC):
    """One workload on one model: the same inputs and the same right answer for every contender.

    Attributes:
        workload: what is done.
        inputs: what runners are given, on the contenders' device.
    """

    # The largest accepted figure of `check` in fp32, and in bf16 or fp16 at most.
    tolerance = FP32_TOLERANCE
    maximum = 0.1

    def __init__(self, workload: Workload, model: torch.nn.Module, kind: Kind, device: torch.device) -> None:
        self.workload = workload
        self.inputs = self._inputs(model, kind, device)
        self._limits: dict[str, float] = {}

    @abstractmethod
    def _inputs(self, model: torch.nn.Module, kind: Kind, device: torch.device) -> Mapping[str, Tensor]:
        """The batch."""

    @abstractmethod
    def prepared(self, runner: Runner, precision: str) -> Prepared:
        """The call that is timed, and what its answer and its parts are."""

    @abstractmethod
    def expect(self, runner: Runner) -> None:
        """Compute the right answer and keep it.

        Args:
            runner: the untouched model in fp32.
        """

    @abstractmethod
    def check(self, precision: str, answer: Any, limit: float) -> Parity:
        """How far an answer is from the right one.

        Args:
            precision: what it was computed in.
            answer: what `prepared(...).answer` made of the run's output.
            limit: the largest accepted figure.

        Raises:
            ValueError: the answer lacks what is compared, or has another shape.
        """

    def limit(self, precision: str, untouched: Runner | None) -> float:
        """The largest accepted figure of `check`.

        Args:
            untouched: for "bf16" and "fp16", the untouched model in that dtype: twice what it loses on these
                inputs, plus 2 eps, is what a contender may lose, up to `maximum`. For "fp32" the one that the
                answer is not from, where a task has a use for it.

        Raises:
            ValueError: a precision without a gate.
        """
        if precision not in self._limits:
            self._limits[precision] = self._gate(precision, untouched)
        return self._limits[precision]

    def _gate(self, precision: str, untouched: Runner | None) -> float:
        if precision == "fp32":
            return self.tolerance
        # Gates of exports in int8 and the like.
        from fastattn.verification.likeness import ROW_GATES

        if precision not in DTYPES:
            if precision not in ROW_GATES:
                accepted = ", ".join((*DTYPES, *ROW_GATES))
                raise ValueError(f"precision is {precision!r}; it must be one of {accepted}")
            return 1 - ROW_GATES[precision]
        if untouched is None:
            raise ValueError(f"the limit of {precision} takes the untouched model in {precision}")
        prepared = self.prepared(untouched, precision)
        output = prepared.run()
        answer = output if prepared.answer is None else prepared.answer(output)
        figure = self.check(precision, answer, 1.0)
        return precision_tolerance(figure, torch.finfo(DTYPES[precision]).eps, self.maximum)
