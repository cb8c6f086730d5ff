"""A model is left as it was found: modes, buffers, configs and random states put back after every case."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["device_of", "evaluating", "left_as_found", "shared_copy", "training"]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor is; the CPU for a model without any."""
    tensor = next((*model.parameters(), *model.buffers()).__iter__(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy of the module tree with the model's own parameters and buffers: no memory, and free to restore
    or swap.
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(tensors))


@contextmanager
def left_as_found(*models: nn.Module) -> Iterator[None]:
    """Modes, buffers and the random states of Python, numpy and torch, put back on exit."""
    modules = list({id(module): module for model in models for module in model.modules()}.values())
    modes = [(module, module.training) for module in modules]
    buffers = [(module, dict(module._buffers)) for module in modules if module._buffers]
    values: list[tuple[Tensor, Tensor]] = []
    for _, named in buffers:
        # A boolean buffer is a constant mask, as large as the longest sequence squared.
        values += [(x, x.clone()) for x in named.values() if x is not None and x.dtype != torch.bool]
    devices = sorted(
        {model_device.index or 0 for model_device in map(device_of, models) if model_device.type == "cuda"}
    )
    python_state = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpy_state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy_state is not None:
            numpy.random.set_state(numpy_state)
        for module, training in modes:
            module.training = training
        for module, named in buffers:
            module._buffers.clear()
            module._buffers.update(named)
        with torch.no_grad():
            for buffer, value in values:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Eval mode for all submodules, each put back as it was."""
    with _modes_kept(*models):
        for model in models:
            model.eval()
        yield


@contextmanager
def training(*models: nn.Module) -> Iterator[None]:
    """Training mode with nothing random in it: dropout, layer drop, masking and router noise are off."""
    with ExitStack() as stack:
        stack.enter_context(_modes_kept(*models))
        owners: dict[int, Any] = {}
        for model in models:
            model.train()
            for module in model.modules():
                owners[id(module)] = module
                config = module.__dict__.get("config")
                for each in (config, *getattr(config, "__dict__", {}).values()):
                    if each is not None and hasattr(each, "model_type"):
                        owners[id(each)] = each
        for owner in owners.values():
            stack.enter_context(_deterministic(owner))
        yield


@contextmanager
def _modes_kept(*models: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _deterministic(owner: Any) -> Iterator[None]:
    """The probabilities of a module or config at zero."""
    changed: dict[str, Any] = {}
    for name, value in owner.__dict__.items():
        is_rate = isinstance(value, float) and ("drop" in name or name.endswith("jitter_noise"))
        if isinstance(owner, nn.modules.dropout._DropoutNd) and name == "p":
            is_rate = isinstance(value, (float, int))
        if is_rate and value:
            changed[name] = 0.0
        elif name == "apply_spec_augment" and value:
            changed[name] = False
    # Through __dict__: a config's own attribute setter may check or rename.
    before = {name: owner.__dict__[name] for name in changed}
    owner.__dict__.update(changed)
    try:
        yield
    finally:
        owner.__dict__.update(before)
