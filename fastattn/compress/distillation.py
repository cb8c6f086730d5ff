"""What a student is taught by a teacher: its logits, its outputs and its hidden states, at real positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Distillation", "mapped_layers", "named_outputs"]

# Hidden states an output may carry: tuples of [B, S, N], the embeddings' first.
_HIDDEN_STATES = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states")
# Floating-point outputs that are no answer.
_NO_ANSWER = ("loss", "past_key_values", "attentions", "cross_attentions", "encoder_last_hidden_state")
# Logits over the positions of a sequence, [B, S]: those of padding are no class.
_OVER_POSITIONS = ("start_logits", "end_logits")


def named_outputs(output: Any) -> dict[str, Any]:
    """A model's output by name: of a transformers output, a mapping, a tuple or one tensor ("output")."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        return {f"output[{index}]": each for index, each in enumerate(output)}
    return {"output": output}


def mapped_layers(student: int, teacher: int) -> list[int]:
    """Which of the teacher's hidden states each of the student's is compared with: evenly spread, the first
    with the first (the embeddings) and the last with the last (Jiao et al. 2020, "TinyBERT", section 3).

    Args:
        student, teacher: how many hidden states each has, the embeddings' counted.

    Example:
        >>> mapped_layers(4, 7)
        [0, 2, 4, 6]
    """
    if student < 2:
        return [teacher - 1] * student
    return [round(index * (teacher - 1) / (student - 1)) for index in range(student)]


@dataclass(frozen=True)
class Distillation:
    """The loss of a student's output against a teacher's, both of the same inputs.

    Logits are compared by the Kullback-Leibler divergence of their softened distributions, times the square
    of the temperature (Hinton, Vinyals and Dean 2015, "Distilling the Knowledge in a Neural Network",
    section 2). Where they are no distribution (one column, or `independent` ones), and for outputs of models
    without logits, it is the mean squared difference over the teacher's mean square; so it is for the hidden
    states, averaged over the student's layers. Positions of padding do not count.

    Attributes:
        temperature: softens both distributions; above 0.
        hidden_states: whether the hidden states are compared, too.
        independent: whether the logits are independent of one another (several labels, or a regression).
        encoder_decoder: whether answers have the positions of a decoder, whose padding its own mask or the
            labels tell.
    """

    temperature: float = 2.0
    hidden_states: bool = True
    independent: bool = False
    encoder_decoder: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature is {self.temperature!r}; it must be above 0, such as 2.0")

    def loss(self, student: Any, teacher: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Float32, a scalar.

        Args:
            student, teacher: what the models returned.
            inputs: what both were given; its masks and labels tell which positions are real.

        Raises:
            ValueError: the two have nothing to compare, or an output or hidden state of another shape.
        """
        mine, wanted = named_outputs(student), named_outputs(teacher)
        answers = {
            name: each
            for name, each in wanted.items()
            if isinstance(each, Tensor) and each.is_floating_point() and name not in _NO_ANSWER
        }
        logits = {name: each for name, each in answers.items() if "logits" in name}
        parts = [
            self._answer_loss(name, _same_shape(name, mine.get(name), each), each, inputs)
            for name, each in (logits or answers).items()
        ]
        states = [name for name in _HIDDEN_STATES if self.hidden_states and wanted.get(name)]
        parts += [self._hidden_loss(name, mine.get(name), wanted[name], inputs) for name in states]
        if not parts:
            raise ValueError(
                "the teacher's output holds nothing to learn from; it has "
                f"{', '.join(wanted) or 'no outputs'}, and logits, other floating-point outputs or hidden "
                "states are compared"
            )
        return torch.stack(parts).sum()

    def _answer_loss(self, name: str, mine: Tensor, wanted: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        if "logits" not in name or self.independent or wanted.shape[-1] == 1:
            return self._relative_error(name, mine, wanted, inputs)
        mine, wanted = mine.float() / self.temperature, wanted.float() / self.temperature
        mask = self._mask(name, wanted, inputs)
        if mask is not None and name in _OVER_POSITIONS:
            lowest = torch.finfo(torch.float32).min
            mine, wanted = mine.masked_fill(~mask, lowest), wanted.masked_fill(~mask, lowest)
        elif mask is not None:
            mine, wanted = mine[mask], wanted[mask]
        mine, wanted = mine.flatten(0, -2), wanted.flatten(0, -2)
        divergence = F.kl_div(
            mine.log_softmax(-1), wanted.log_softmax(-1), reduction="batchmean", log_target=True
        )
        return divergence * self.temperature**2

    def _hidden_loss(self, name: str, mine: Any, wanted: Any, inputs: Mapping[str, Any]) -> Tensor:
        if not mine:
            raise ValueError(f"the teacher returns {name} and the student does not; pass hidden_states=False")
        losses = []
        for state, index in zip(mine, mapped_layers(len(mine), len(wanted)), strict=True):
            target = wanted[index]
            if state.shape != target.shape:
                raise ValueError(
                    f"the student's {name} are {list(state.shape)} and the teacher's {list(target.shape)}; "
                    "only equal sizes are compared: pass hidden_states=False"
                )
            losses.append(self._relative_error(name, state, target, inputs))
        return torch.stack(losses).mean()

    def _relative_error(self, name: str, mine: Tensor, wanted: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Mean squared difference over the teacher's mean square: alike for layers of unlike scale."""
        mask = self._mask(name, wanted, inputs)
        if mask is not None:
            mine, wanted = mine[mask], wanted[mask]
        wanted = wanted.float()
        scale = wanted.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        return (mine.float() - wanted).square().mean() / scale

    def _mask(self, name: str, x: Tensor, inputs: Mapping[str, Any]) -> Tensor | None:
        """Bool [B, S], True where a position of an output [B, S, ...] is real; None where nothing tells, or
        the output has no positions.
        """
        mask = inputs.get("attention_mask")
        if self.encoder_decoder and not name.startswith("encoder"):
            mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
            if mask is None and isinstance(labels, Tensor):
                mask = labels != -100
        has_positions = x.dim() > 2 or name in _OVER_POSITIONS
        if not has_positions or not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
            return None
        return mask.bool()


def _same_shape(name: str, mine: Any, wanted: Tensor) -> Tensor:
    if not isinstance(mine, Tensor) or mine.shape != wanted.shape:
        found = list(mine.shape) if isinstance(mine, Tensor) else "missing"
        raise ValueError(
            f"the teacher's output {name!r} has shape {list(wanted.shape)} and the student's is {found}; "
            "both must answer alike"
        )
    return mine
