"""What a model was before `fastattn.quantize`, kept so that it can be put back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fastattn.compress.quantization.projections import fold_projections
from fastattn.layers import QuantizedLinear
from fastattn.swap import ORIGINAL_CONFIG, QUANTIZED

if TYPE_CHECKING:
    from fastattn.compress.quantization.smoothquant import Smoothing

__all__ = ["Originals", "detach", "is_quantized", "put_back", "record_of"]

_MISSING = "(no such attribute)"


@dataclass
class Originals:
    """Every change to a model, in order; plain data, so that the model can still be copied and pickled.

    Attributes:
        keeps: whether the float layers are held, so that all of it can be undone.
        layers: (parent, attribute, the float layer), where they are held.
        replaced: whether a float layer is gone from the model.
        attentions: attention layers whose projections are layers now, with their class and joint bias.
        attributes: (object, attribute, its value before, or `_MISSING`).
        configs: (a config of a quantized model, the one it is a copy of).
        smoothing: what SmoothQuant scaled.
    """

    keeps: bool
    layers: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    replaced: bool = False
    attentions: list[tuple[nn.Module, type[nn.Module], nn.Parameter | None]] = field(default_factory=list)
    attributes: list[tuple[Any, str, Any]] = field(default_factory=list)
    configs: list[tuple[Any, Any]] = field(default_factory=list)
    smoothing: Smoothing | None = None

    def attach(self, model: nn.Module) -> None:
        model.__dict__[QUANTIZED] = self

    def replace(self, places: tuple[tuple[nn.Module, str], ...], layer: nn.Module) -> None:
        """Register `layer` in all `places`."""
        for parent, attribute in places:
            if self.keeps:
                self.layers.append((parent, attribute, parent._modules[attribute]))  # type: ignore[arg-type]
            parent._modules[attribute] = layer
        self.replaced = True
        if not self.keeps:
            # It holds the float weights it scaled.
            self.smoothing = None

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """`owner.name = value`, below any `__setattr__`, and the value before recorded."""
        self.attributes.append((owner, name, owner.__dict__.get(name, _MISSING)))
        owner.__dict__[name] = value

    @staticmethod
    def exchange_configs(model: nn.Module, instead: Mapping[int, Any]) -> None:
        """Give every module the config in place of the one of that id, now and when `unfuse` is called."""
        for module in model.modules():
            for name in ("config", ORIGINAL_CONFIG):
                held = module.__dict__.get(name)
                if id(held) in instead:
                    module.__dict__[name] = instead[id(held)]

    def undo(self, model: nn.Module) -> None:
        """Put everything back; float layers follow to where the quantized ones were moved."""
        for parent, attribute, layer in reversed(self.layers):
            now: Any = parent._modules[attribute]
            layer.to(now.weight.device).train(now.training)
            parent._modules[attribute] = layer
        for attention, cls, bias in reversed(self.attentions):
            fold_projections(attention, bias)
            attention.__class__ = cls
        for owner, name, value in reversed(self.attributes):
            if isinstance(value, str) and value == _MISSING:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value
        self.exchange_configs(model, {id(config): before for config, before in self.configs})
        for module in model.modules():
            # A copy that `optimize` made since.
            if self.configs and ORIGINAL_CONFIG in module.__dict__:
                module.__dict__["config"].__dict__.pop("quantization_config", None)
        if self.smoothing is not None:
            self.smoothing.undo()
        if "fastattn.compress.kv_cache" in sys.modules:
            from fastattn.compress.kv_cache import stop_quantized_cache

            stop_quantized_cache(model)


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer of `model` holds a quantized weight."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())


def record_of(model: nn.Module) -> Originals | None:
    record: Originals | None = model.__dict__.get(QUANTIZED)
    return record


def detach(model: nn.Module) -> None:
    """Forget an earlier record."""
    model.__dict__.pop(QUANTIZED, None)


def put_back(model: nn.Module) -> None:
    """Undo `fastattn.quantize`, from the layers it kept.

    Raises:
        ValueError: it kept none; the message names what to load again.
    """
    record = record_of(model)
    if record is None:
        config = getattr(model, "config", None)
        name = getattr(config, "name_or_path", "") or "what it was made from"
        raise ValueError(
            f"{type(model).__name__} is quantized and its float weights were not kept: load {name} again, or "
            "quantize with keep_original=True to be able to restore"
        )
    record.undo(model)
    detach(model)
