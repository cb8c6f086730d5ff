"""A runner whose model lives in a process of its own, which times itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from fastattn.bench.contenders.runner import Generated, Runner, TrainStep
from fastattn.bench.remote import RemoteOutput, RemoteProcess, RemoteRun
from fastattn.bench.timers import Sample

__all__ = ["GRADIENT", "RemoteRunner"]

GRADIENT = "gradient of "
"""What the name of a gradient's array begins with."""


class RemoteRunner(Runner):
    """The model in `child`, whose worker is asked for {"do": "forward" | "generate" | "logits" | "train"}.

    Arrays go both ways under the names the model gives them; "tokens" and "logits" are a decode's, "loss" and
    "gradient of NAME" a training step's.
    """

    def __init__(self, child: RemoteProcess) -> None:
        self._child = child

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        return self.forward_call(inputs)()

    def forward_call(self, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        return _Call(self._run({"do": "forward"}, inputs), _Outputs)

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        output: Generated = self.generate_call(inputs, new_tokens)()
        return Generated(output.tokens, output.stamps_ms)

    def generate_call(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Callable[[], Any]:
        return _Call(self._run({"do": "generate", "new_tokens": new_tokens}, inputs), _Tokens)

    def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        call = _Call(self._run({"do": "logits"}, {**inputs, "tokens": tokens}), _Outputs)
        logits: torch.Tensor = call()["logits"]
        return logits

    def train_step(self, inputs: Mapping[str, torch.Tensor]) -> TrainStep:
        step: TrainStep = self.train_call(inputs)()
        return step

    def train_call(self, inputs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        return _Call(self._run({"do": "train"}, inputs), _Step)

    def _run(self, request: Mapping[str, Any], inputs: Mapping[str, torch.Tensor]) -> RemoteRun:
        return self._child.run(request, {name: tensor.cpu().numpy() for name, tensor in inputs.items()})


class _Call:
    """A workload in the other process, which times itself (`timers.SelfTimed`)."""

    def __init__(self, run: RemoteRun, kind: Callable[[RemoteOutput], Any]) -> None:
        self._run, self._kind = run, kind

    @property
    def peak_host_bytes(self) -> int | None:
        return self._run.peak_host_bytes

    def sample(self, calls: int) -> Sample:
        sample = self._run.sample(calls)
        return sample._replace(output=self._kind(sample.output))

    def __call__(self) -> Any:
        return self.sample(1).output


class _Outputs(Mapping[str, torch.Tensor]):
    """Arrays by name, fetched when they are looked at: not while the call is timed."""

    def __init__(self, output: RemoteOutput) -> None:
        self._output = output

    @cached_property
    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(array) for name, array in self._output.arrays().items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class _Tokens:
    """What `Generated` is, its tokens fetched when they are looked at."""

    def __init__(self, output: RemoteOutput) -> None:
        self._outputs = _Outputs(output)
        self.stamps_ms = tuple(output.parts["stamps_ms"])

    @property
    def tokens(self) -> torch.Tensor:
        return self._outputs["tokens"]


class _Step:
    """What `TrainStep` is, its tensors fetched when they are looked at."""

    def __init__(self, output: RemoteOutput) -> None:
        self._outputs = _Outputs(output)
        self.forward_ms, self.backward_ms = (output.parts[name][0] for name in ("forward_ms", "backward_ms"))

    @property
    def loss(self) -> torch.Tensor:
        return self._outputs["loss"]

    @property
    def gradients(self) -> dict[str, torch.Tensor]:
        return {
            name.removeprefix(GRADIENT): each
            for name, each in self._outputs.items()
            if name.startswith(GRADIENT)
        }
