"""One call of the model for a batch: encode, classify, or the logits after a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from fastattn.verification.likeness import JUDGED_ROWS, few_columns

__all__ = ["ForwardWork"]


class ForwardWork(Work):
    """The model's outputs at real positions; of a prompt, the logits of its last position, which lower
    precisions are compared by without their mean.

    Outputs of few columns (labels) are compared over 32 sequences at least: where the workload has fewer,
    contenders answer more batches of its shape, not timed, as a sequence or two of labels say little.
    """

    def _inputs(self, model: torch.nn.Module, kind: Kind, device: torch.device) -> Mapping[str, Tensor]:
        if self.workload.task == "prefill":
            self._more: Sequence[Mapping[str, Tensor]] = ()
            return with_positions(prompts(self.workload, model, device), model)
        count = -(-JUDGED_ROWS // self.workload.batch)
        first, *self._more = (
            token_inputs(model, replace(self.workload, seed=self.workload.seed + number), device)
            for number in range(count)
        )
        return first

    def prepared(self, runner: Runner, precision: str) -> Prepared:
        def answer(output: Any) -> Any:
            return self._with_others(runner, output) if self._others else output

        return Prepared(runner.forward_call(self.inputs), answer=answer)

    def expect(self, runner: Runner) -> None:
        # A process's first call was once seen 4e-5 off all that followed, which then counted to each row.
        runner.forward(self.inputs)
        found = floating_tensors(runner.forward(self.inputs))
        if not found:
            raise ValueError("the untouched model's output holds no floating-point tensor to compare")
        self._main = main_name(found)
        self._expected = self._compared(found)
        self._others = self._more if any(self._is_few(value) for value in self._expected.values()) else ()
        batches = (self.inputs, *self._others)
        self._mask = torch.cat([each["attention_mask"] for each in batches]).cpu()
        if self._others:
            self._expected = self._with_others(runner, found)

    def check(self, precision: str, answer: Any, limit: float) -> Parity:
        found = self._compared(named(answer, self._main))
        expected = self._expected
        if self.workload.task == "prefill":
            if precision != "fp32":
                found, expected = (
                    {name: without_mean(value) for name, value in each.items()} for each in (found, expected)
                )
            return compared(precision, expected, found, limit, None)
        return compared(precision, expected, found, limit, self._mask)

    def _is_few(self, output: Tensor) -> bool:
        return output.shape[:1] == (self.workload.batch,) and few_columns(output)

    def _with_others(self, runner: Runner, output: Any) -> dict[str, Tensor]:
        """The outputs of the workload's batch and the other ones, joined where they have a row a sequence."""
        answers = [named(output, self._main)]
        answers += [named(runner.forward(batch), self._main) for batch in self._others]
        return {
            name: torch.cat([each[name] for each in answers])
            if value.shape[:1] == (self.workload.batch,)
            else value
            for name, value in answers[0].items()
        }

    def _compared(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs; of a prompt the last position's logits, which are all that some contenders give."""
        if self.workload.task != "prefill":
            return dict(outputs)
        logits = outputs.get(self._main)
        if logits is None:
            return {}
        return {self._main: logits[:, -1] if logits.dim() == 3 else logits}
