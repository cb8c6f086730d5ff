"""One training step: forward and backward, without an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders.runner import Runner, TrainStep
from fastattn.bench.contenders.source import Kind, token_inputs
from fastattn.bench.contenders.stamps import start_token
from fastattn.bench.parity import Parity
from fastattn.bench.tasks.answers import kind_of_figure
from fastattn.bench.tasks.work import Work
from fastattn.bench.timing import Prepared

__all__ = ["TrainWork"]

# Heads whose labels are tokens, one a position.
_TOKEN_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "MTModel")
# What a loss takes no notice of, in PyTorch and transformers alike.
_IGNORED = -100
# Gradients smaller than this part of the largest are compared on that scale.
_SMALL = 0.05


@dataclass(frozen=True)
class _Trained:
    """A copy of a step's loss and gradients, float32 on the CPU: the next step overwrites its own."""

    loss: float
    gradients: Mapping[str, Tensor]


class TrainWork(Work):
    """The loss and every parameter's gradient.

    A gradient's error is the norm of the difference over its own norm, or over a twentieth of the largest
    value of all gradients where that is more: some are zero but for rounding. By the norm, and not by the
    largest difference: where an activation has a kink, rounding decides on which side of it a neuron near
    zero lies, and with it a whole row of a gradient. In eager fp32, one value of T5-small's gradients is 2%
    of the largest from float64's, and the norm 0.2%. So in fp32, too, the limit is twice what the untouched
    model's two implementations of attention differ by, if that is more than for other tasks.
    """

    # The gradients of a small model's bias can cancel to a few units of bf16; one left out has an error of 1.
    maximum = 0.5
    _fp32_maximum = 0.01

    def _inputs(self, model: torch.nn.Module, kind: Kind, device: torch.device) -> Mapping[str, Tensor]:
        batch = token_inputs(model, self.workload, device)
        return {**batch, **_labels(model, batch, self.workload.seed)}

    def prepared(self, runner: Runner, precision: str) -> Prepared:
        return Prepared(runner.train_call(self.inputs), answer=_trained, parts=_parts)

    def expect(self, runner: Runner) -> None:
        self._expected = _trained(runner.train_step(self.inputs))
        if not self._expected.gradients:
            raise ValueError("no parameter of the untouched model has a gradient")

    def check(self, precision: str, answer: _Trained, limit: float) -> Parity:
        kind = kind_of_figure(precision)
        wanted = self._expected
        figures = [Parity(abs(answer.loss - wanted.loss), abs(wanted.loss), limit, kind, "loss")]
        # A parameter without a gradient is to an optimizer as one with a gradient of zeros.
        largest = max(
            (float(each.abs().max()) for each in wanted.gradients.values() if each.numel()), default=0.0
        )
        for name in sorted({*answer.gradients, *wanted.gradients}):
            right = wanted.gradients.get(name, torch.zeros(()))
            error = float((answer.gradients.get(name, torch.zeros(())) - right).norm())
            scale = max(float(right.norm()), _SMALL * largest)
            figures.append(Parity(error, scale, limit, kind, f"gradient of {name}"))
        # Written so that a NaN is the worst.
        return max(figures, key=lambda x: (not x.relative_error <= float("inf"), x.relative_error))

    def _gate(self, precision: str, untouched: Runner | None) -> float:
        if precision != "fp32":
            return super()._gate(precision, untouched)
        if untouched is None:
            return self.tolerance
        figure = self.check(precision, _trained(untouched.train_step(self.inputs)), 1.0)
        return min(self._fp32_maximum, max(self.tolerance, 2 * figure.relative_error))


def _labels(model: Any, batch: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """`labels` made from the batch's own tokens, -100 at padding; none for a model without a head known here.
    With them an encoder-decoder's `decoder_input_ids`, which are the labels moved on by one.
    """
    ids, mask, config = batch["input_ids"], batch["attention_mask"], model.config
    name = type(model).__name__
    if "labels" not in inspect.signature(model.forward).parameters:
        return {}
    if name.endswith(_TOKEN_HEADS):
        labels = {"labels": ids.masked_fill(mask == 0, _IGNORED)}
        if not config.is_encoder_decoder:
            return labels
        start = torch.full_like(ids[:, :1], start_token(model))
        return {**labels, "decoder_input_ids": torch.cat((start, ids[:, :-1]), 1)}
    if name.endswith("ForTokenClassification"):
        return {"labels": (ids % config.num_labels).masked_fill(mask == 0, _IGNORED)}
    if not name.endswith("ForSequenceClassification"):
        return {}
    if config.problem_type == "regression" or (config.problem_type is None and config.num_labels == 1):
        shape = (len(ids), config.num_labels) if config.num_labels > 1 else (len(ids),)
        wanted = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return {"labels": wanted.to(ids.device)}
    first = ids[:, 0]
    if config.problem_type == "multi_label_classification":
        bits = first[:, None] + torch.arange(config.num_labels, device=ids.device)
        return {"labels": (bits % 2).float()}
    return {"labels": first % config.num_labels}


def _trained(step: TrainStep) -> _Trained:
    gradients = {name: x.detach().float().cpu().clone() for name, x in step.gradients.items()}
    return _Trained(float(step.loss), gradients)


def _parts(step: TrainStep) -> dict[str, list[float]]:
    return {"forward_ms": [step.forward_ms], "backward_ms": [step.backward_ms]}
