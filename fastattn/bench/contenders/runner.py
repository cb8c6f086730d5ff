"""What a builder returns: a model made ready once, and what it can be asked to do for every workload."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from fastattn.bench.memory import MemoryMeter

__all__ = ["Generated", "Runner", "Stages", "TrainStep"]


@dataclass(frozen=True)
class Generated:
    """What one greedy decode gave.

    Attributes:
        tokens: int64 [batch, new_tokens], without the prompt.
        stamps_ms: when each token was there, milliseconds from the call: as many as new tokens, or empty
            where the contender cannot tell.
    """

    tokens: torch.Tensor
    stamps_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrainStep:
    """What one forward and backward gave.

    Attributes:
        loss: a scalar.
        gradients: by parameter name, as the untouched model names them.
        forward_ms, backward_ms: wall time of the two halves.
    """

    loss: torch.Tensor
    gradients: Mapping[str, torch.Tensor]
    forward_ms: float
    backward_ms: float


class Runner:
    """A contender built once, for all workloads. A builder's `tasks` say which of these it has."""

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The model's output for one batch: a ModelOutput, a mapping of names, or the main output alone.

        Args:
            inputs: input_ids and attention_mask, int64 [batch, sequence], padded on the right; token_type_ids
                where the model has them. A decoder's prompts are padded on the left, with position_ids where
                it takes them and there is padding.

        Returns:
            Hidden states or a head's logits; of a decoder the logits of the last position at least, with the
            cache that decoding would go on from; of an encoder-decoder its encoder's hidden states.
        """
        raise TypeError(f"{type(self).__name__} has no forward")

    def forward_call(self, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        """What is timed of `forward`; a runner in another process gives a `timers.SelfTimed`."""
        return partial(self.forward, inputs)

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        """Exactly `new_tokens` more tokens a sequence, greedily: a decoder's after left-padded prompts, an
        encoder-decoder's from a right-padded source.
        """
        raise TypeError(f"{type(self).__name__} does not generate")

    def generate_call(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Callable[[], Any]:
        """What is timed of `generate`; its output has what `Generated` has."""
        return partial(self.generate, inputs, new_tokens)

    def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        """Logits [batch, new_tokens, vocabulary] that predict each of `tokens` [batch, new_tokens] after the
        prompt `inputs`, the tokens before it given: what a lower precision's decode is compared by.
        """
        raise TypeError(f"{type(self).__name__} gives no logits")

    def train_step(self, inputs: Mapping[str, torch.Tensor]) -> TrainStep:
        """Loss and gradients of one batch, in training mode without dropout; gradients are cleared before the
        next.

        Args:
            inputs: as `forward` takes them, padded on the right, with `labels` where the model makes a loss
                of them. Where it does not, the loss is the mean squared distance of its first output, at real
                positions, from the sine of 0, 1, 2, ... in that output's shape.
        """
        raise TypeError(f"{type(self).__name__} does not train")

    def train_call(self, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        """What is timed of `train_step`; its output has what `TrainStep` has."""
        return partial(self.train_step, inputs)


# OpenVINO's "compile" is what others call "load".
_LOADING = ("load", "compile")


@dataclass
class Stages:
    """Times what a builder does once: `with stages("export"): ...`.

    Attributes:
        memory: begins to count where what was converted is loaded: what a converter leaves in this process is
            not what running its result takes.
        versions: of the packages that run it, where its environment is not this process'.
    """

    times_ms: dict[str, float] = field(default_factory=dict)
    memory: MemoryMeter | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if self.memory is not None and name in _LOADING:
            self.memory.restart()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.times_ms[name] = self.times_ms.get(name, 0.0) + (time.perf_counter() - begin) * 1e3
