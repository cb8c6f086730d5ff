"""One call of the model for a batch: encode, classify, or the logits after a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders.runner import Runner
from fastattn.bench.contenders.source import Kind, token_inputs
from fastattn.bench.parity import Parity, floating_tensors
from fastattn.bench.tasks.answers import compared, main_name, named, without_mean
from fastattn.bench.tasks.prompts import prompts, with_positions
from fastattn.bench.tasks.work import Work
from fastattn.bench.timing import Prepared

__all__ = ["ForwardWork"]


class ForwardWork(Work):
    """The model's outputs at real positions; of a prompt, the logits of its last position, which lower
    precisions are compared by without their mean.
    """

    def _inputs(self, model: torch.nn.Module, kind: Kind, device: torch.device) -> Mapping[str, Tensor]:
        if self.workload.task == "prefill":
            return with_positions(prompts(self.workload, model, device), model)
        return token_inputs(model, self.workload, device)

    def prepared(self, runner: Runner, precision: str) -> Prepared:
        return Prepared(runner.forward_call(self.inputs))

    def expect(self, runner: Runner) -> None:
        # A process's first call was once seen 4e-5 off all that followed, which then counted to each row.
        runner.forward(self.inputs)
        found = floating_tensors(runner.forward(self.inputs))
        if not found:
            raise ValueError("the untouched model's output holds no floating-point tensor to compare")
        self._main = main_name(found)
        self._expected = self._compared(found)

    def check(self, precision: str, answer: Any, limit: float) -> Parity:
        found = self._compared(named(answer, self._main))
        expected = self._expected
        if self.workload.task == "prefill":
            if precision != "fp32":
                found, expected = (
                    {name: without_mean(value) for name, value in each.items()} for each in (found, expected)
                )
            return compared(precision, expected, found, limit, None)
        return compared(precision, expected, found, limit, self.inputs["attention_mask"].cpu())

    def _compared(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs; of a prompt the last position's logits, which are all that some contenders give."""
        if self.workload.task != "prefill":
            return dict(outputs)
        logits = outputs.get(self._main)
        if logits is None:
            return {}
        return {self._main: logits[:, -1] if logits.dim() == 3 else logits}
