"""Liger's Triton kernels in the untouched model, by its own patches."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fastattn.bench.contenders.requirements import require_packages
from fastattn.bench.contenders.runner import Generated, Runner, Stages, TrainStep
from fastattn.bench.contenders.source import DTYPES, Kind, Source
from fastattn.bench.contenders.torch_models import TorchRunner
from fastattn.bench.timing import MissingError

__all__ = ["build"]

Inputs = Mapping[str, torch.Tensor]


def build(source: Source, precision: str, stages: Stages) -> Runner:
    """`apply_liger_kernel_to_...` of the model's type, with its defaults, on a copy of the model with SDPA.

    Raises:
        MissingError: liger-kernel is not installed, the benchmark does not run on a GPU, or Liger has no
            kernels for the model.
    """
    require_packages("liger_kernel")
    if source.device.type != "cuda":
        raise MissingError("GPU: Liger's kernels need CUDA or ROCm")
    apply = _apply_function(source.model)
    with stages("load model"):
        model: Any = source.untouched()
        model.set_attn_implementation("sdpa")
        model = model.to(source.device, DTYPES[precision]).eval()
    with stages("swap"):
        return LigerModel(model, source.kind, apply)


def _apply_function(model: nn.Module) -> Callable[..., None]:
    """Liger's function for the model's type.

    Raises:
        MissingError: there is none.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    config: Any = model.config
    found: Callable[..., None] | None = MODEL_TYPE_TO_APPLY_LIGER_FN.get(config.model_type)
    if found is None:
        raise MissingError(f"Liger's kernels for {config.model_type}: it has none")
    return found


class LigerModel(TorchRunner):
    """The patched model, and the rest of transformers as it was.

    Liger's functions patch the instance they are given, and beside it the functions and classes of the module
    that every model of that type looks up: the untouched contenders' too. Those are put in place for this
    model's calls alone.

    Args:
        model: an independent copy, on its device and in its dtype.
        kind: what it is.
        apply: Liger's function for it.
    """

    def __init__(self, model: nn.Module, kind: Kind, apply: Callable[..., None]) -> None:
        before = _names(model)
        apply(model=model)
        self._patches = [
            (owner, name, vars(owner)[name], original)
            for owner, names in before.items()
            for name, original in names.items()
            if vars(owner)[name] is not original
        ]
        self._put_back()
        super().__init__(model, kind)

    def forward(self, inputs: Inputs) -> Any:
        with self._patched():
            return super().forward(inputs)

    def generate(self, inputs: Inputs, new_tokens: int) -> Generated:
        with self._patched():
            return super().generate(inputs, new_tokens)

    def logits(self, inputs: Inputs, tokens: torch.Tensor) -> torch.Tensor:
        with self._patched():
            return super().logits(inputs, tokens)

    def train_step(self, inputs: Inputs) -> TrainStep:
        with self._patched():
            return super().train_step(inputs)

    @contextmanager
    def _patched(self) -> Iterator[None]:
        for owner, name, patched, _ in self._patches:
            setattr(owner, name, patched)
        try:
            yield
        finally:
            self._put_back()

    def _put_back(self) -> None:
        for owner, name, _, original in self._patches:
            setattr(owner, name, original)


def _names(model: nn.Module) -> dict[Any, dict[str, Any]]:
    """What the model's module of transformers holds, and the functions of the classes defined there."""
    module: Any = sys.modules[type(model).__module__]
    owners: dict[Any, dict[str, Any]] = {module: dict(vars(module))}
    for value in vars(module).values():
        if inspect.isclass(value) and value.__module__ == module.__name__:
            owners[value] = {
                name: each for name, each in vars(value).items() if isinstance(each, FunctionType)
            }
    return owners
