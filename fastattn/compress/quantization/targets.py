"""Which linear layers of a model are quantized, and why the others stay."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastattn.layers import MultiheadAttention, QuantizedLinear
from fastattn.layers.plain import is_plain

__all__ = ["Target", "check_exclude", "find_targets", "is_conv1d", "is_open_attention", "is_read_in_parts"]

# Subclasses of nn.Linear with a forward of their own that computes the same.
_LINEAR_ALIKE = {"transformers.models.falcon.modeling_falcon.FalconLinear"}


@dataclass(frozen=True)
class Target:
    """A linear layer of the model.

    Attributes:
        name: as `named_modules` gives it (the first, of a layer that has several).
        kind: "linear" or "conv1d", transformers' layer of that name, whose weight is [K, N].
        layer: the layer.
        places: every (parent, attribute) it is registered under.
        reason: why it stays; empty where it may be quantized.
    """

    name: str
    kind: str
    layer: nn.Module
    places: tuple[tuple[nn.Module, str], ...]
    reason: str = ""

    @property
    def weight(self) -> Tensor:
        """[N, K], a view."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight.t() if self.kind == "conv1d" else weight

    @property
    def bias(self) -> nn.Parameter | None:
        bias: nn.Parameter | None = self.layer.bias  # type: ignore[assignment]
        return bias


def check_exclude(names: Sequence[str], exclude: Sequence[str]) -> None:
    """Raise ValueError where a pattern names no module."""
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude names {pattern!r}, which no module of the model is called")


def find_targets(model: nn.Module, exclude: Sequence[str] = ()) -> list[Target]:
    """Every linear layer below `model`, in order, those that stay with the reason.

    Args:
        model: of any make; nothing in it changes.
        exclude: names of modules to leave alone, with shell wildcards; what is below them stays, too.
    """
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is not None:
                places.setdefault(id(child), []).append((parent, attribute))
    heads = _heads(model)
    tied = _tied_elsewhere(model)
    found = []
    for name, layer in model.named_modules():
        kind = _kind(layer)
        if kind is None or not name:
            continue
        own = tuple(places[id(layer)])
        reason = (
            _cannot_quantize(layer, kind, own)
            or ("excluded by the caller" if _is_excluded(name, exclude) else "")
            or ("output head" if id(layer) in heads else "")
            or tied.get(id(layer.weight), "")
            or ("an adapter" if any(part.startswith("lora_") for part in name.split(".")) else "")
        )
        found.append(Target(name, kind, layer, own, reason))
    return found


def is_conv1d(layer: nn.Module) -> bool:
    """Whether it is transformers' linear layer with its weight transposed."""
    kind = type(layer)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def is_open_attention(layer: nn.Module) -> bool:
    """Whether the projections of this attention layer may be replaced: it is torch.nn's own or ours."""
    return type(layer) in (nn.MultiheadAttention, MultiheadAttention)


def is_read_in_parts(target: Target) -> bool:
    """Whether it is an attention layer's joint projection, whose quantized weight must be plain for that."""
    return any(attribute == "in_proj" for _, attribute in target.places)


def _kind(layer: nn.Module) -> str | None:
    if is_conv1d(layer):
        return "conv1d"
    return "linear" if isinstance(layer, nn.Linear) else None


def _is_excluded(name: str, exclude: Sequence[str]) -> bool:
    parts = name.split(".")
    ancestors = [".".join(parts[: count + 1]) for count in range(len(parts))]
    return any(fnmatch.fnmatchcase(each, pattern) for each in ancestors for pattern in exclude)


def _cannot_quantize(layer: Any, kind: str, places: tuple[tuple[nn.Module, str], ...]) -> str:
    cls = type(layer)
    if isinstance(layer, QuantizedLinear):
        return "quantized already"
    if not is_plain(layer, cls):
        return "it has hooks, a forward of its own or parameters of another make"
    known = kind == "conv1d" or cls.forward is nn.Linear.forward
    if not known and f"{cls.__module__}.{cls.__qualname__}" not in _LINEAR_ALIKE:
        return f"{cls.__qualname__} is a subclass of Linear with a forward of its own"
    if not layer.weight.is_floating_point() or layer.weight.dim() != 2 or not layer.weight.numel():
        return f"its weight is {layer.weight.dtype} {list(layer.weight.shape)}"
    for parent, attribute in places:
        if isinstance(parent, nn.MultiheadAttention) and not is_open_attention(parent):
            return f"{type(parent).__qualname__} reads its weight itself"
        # BLOOM computes these two slice by slice where its pretraining did.
        slices = getattr(getattr(parent, "config", parent), "slow_but_exact", False)
        if slices and getattr(parent, "pretraining_tp", 1) > 1 and attribute in ("dense", "dense_4h_to_h"):
            return f"{type(parent).__qualname__} reads its weight slice by slice (slow_but_exact)"
        if cls is NonDynamicallyQuantizableLinear and not isinstance(parent, nn.MultiheadAttention):
            return f"{type(parent).__qualname__} may read its weight itself"
    return ""


def _heads(model: nn.Module) -> set[int]:
    """ids of the layers that give the model's answer: the output embeddings, whatever a transformers model
    has outside its base model, and, of other models, a linear layer that is their last.
    """
    heads: set[int] = set()
    pretrained = False
    for module in model.modules():
        prefix = getattr(module, "base_model_prefix", None)
        if not isinstance(prefix, str):
            continue
        pretrained = True
        heads.update(id(each) for each in _output_embeddings(module))
        base = getattr(module, prefix, None) if prefix else None
        if isinstance(base, nn.Module) and base is not module:
            inside = {id(each) for each in base.modules()}
            heads.update(id(each) for each in module.modules() if id(each) not in inside)
    if not pretrained:
        heads.update(id(each) for each in _last_layer(model))
    return heads


def _output_embeddings(module: Any) -> Iterator[nn.Module]:
    try:
        found = module.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return
    if isinstance(found, nn.Module):
        yield found


def _last_layer(model: nn.Module) -> Iterator[nn.Module]:
    """The last module with parameters, where it is a linear layer on its own and not one of many alike."""
    last = None
    inner: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.MultiheadAttention)):
            inner.update(id(each) for each in module.modules())
        if any(each is not None for each in module._parameters.values()):
            last = module
    if isinstance(last, nn.Linear) and id(last) not in inner:
        yield last


def _tied_elsewhere(model: nn.Module) -> Mapping[int, str]:
    """id of a parameter -> the reason, where something other than linear layers has it, too."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    reasons = {}
    for key, modules in owners.items():
        kinds = {_kind(module) for module in modules}
        other = next((module for module in modules if _kind(module) is None), None)
        if other is not None and len(modules) > 1:
            reasons[key] = f"its weight is tied to that of a {type(other).__name__}"
        elif len(kinds) > 1:
            reasons[key] = "its weight is tied to that of a layer that has it transposed"
    return reasons
