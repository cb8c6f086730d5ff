"""An encoder as converters that trace want it: positional arguments and a tuple of tensors."""

from __future__ import annotations

from typing import Any

import torch

from fastattn.bench.contenders.source import Source

__all__ = ["Traced"]


class Traced:
    """The untouched model in eager attention, wrapped, with a batch to trace.

    Attributes:
        module: takes `inputs` by position and returns `outputs` as a tuple.
        example: the batch, in the order of `inputs`.
        inputs: the names of what it takes.
        outputs: the names of what it gives: every tensor of the model's own output.
        config: the model's.
    """

    def __init__(self, source: Source) -> None:
        model: Any = source.untouched()
        # Its plain matrix products are what converters' fusions look for.
        choose = getattr(model, "set_attn_implementation", None)
        if choose is not None:
            choose("eager")
        self.config: Any = model.config
        self.inputs = tuple(source.sample)
        self.example = tuple(source.sample.values())
        with torch.inference_mode():
            answer = model(**source.sample, return_dict=True)
        self.outputs = tuple(name for name, value in answer.items() if isinstance(value, torch.Tensor))
        self.module = _Positional(model, self.inputs, self.outputs).eval()


class _Positional(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answer = self.model(**dict(zip(self.inputs, args, strict=True)), return_dict=True)
        return tuple(answer[name] for name in self.outputs)
