"""Whole layers: which go first, and taking them out of their stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastattn.compress.pruning.structure import LayerStack
from fastattn.layers import FusedLayer
from fastattn.models.links import link_layers, unlink

__all__ = ["check_layers", "choose_layers", "relink", "remove_layers"]


def check_layers(stack: LayerStack, removed: Sequence[int]) -> None:
    """Raise a ValueError where the layers `removed` cannot go."""
    if any(not 0 <= index < stack.depth for index in removed) or len(set(removed)) != len(removed):
        raise ValueError(
            f"layers of {stack.name!r} are numbered 0 to {stack.depth - 1}, each at most once; got "
            f"{list(removed)}"
        )
    if len(removed) == stack.depth:
        raise ValueError(f"{stack.name!r} must keep at least one of its {stack.depth} layers")
    if removed and stack.fixed:
        raise ValueError(f"no layer of {stack.name!r} can be removed: {stack.fixed}")
    if 0 in removed and stack.first_stays:
        raise ValueError(f"the first layer of {stack.name!r} cannot be removed: {stack.first_stays}")


def choose_layers(
    stack: LayerStack, count: int, scores: Sequence[float], kept: Sequence[int]
) -> tuple[int, ...]:
    """The `count` layers of least importance by `scores`, one a layer, of those not `kept`; of equal ones,
    the later.
    """
    free = [index for index in range(stack.depth) if index not in kept]
    free.sort(key=lambda index: (scores[index % len(scores)], -index))
    return tuple(sorted(free[:count]))


def remove_layers(stack: LayerStack, removed: Sequence[int]) -> None:
    """Take layers out of a stack, renumber the others and let its configuration say so."""
    kept = [index for index in range(stack.depth) if index not in set(removed)]
    for config in _each_once(owner for owner, _ in stack.counts):
        for name in stack.lists:
            entries = getattr(config, name, None)
            if isinstance(entries, list | tuple) and len(entries) == stack.depth:
                setattr(config, name, [entries[index] for index in kept])
                if name == "attention_layers":
                    # GPT-Neo says it twice: here as kinds of layers and how often they come.
                    config.attention_types = [[[entries[index]], 1] for index in kept]
    for owner, name in stack.counts:
        setattr(owner, name, len(kept))
        if hasattr(owner, "num_decoder_layers"):
            # T5's caches are made for as many layers as the encoder has, unless the configuration says how
            # many the decoder has by the name that other encoder-decoders have for it.
            owner.decoder_layers = owner.num_decoder_layers
    if stack.repeats:
        return
    first = stack.layers[0]
    for index in sorted(removed, reverse=True):
        del stack.layers[index]
    if 0 in removed:
        _hand_on_relative_bias(first, stack.layers[0])
    for index, layer in enumerate(stack.layers):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):
                # Encoders' layers have none.
                if isinstance(module.__dict__.get(name), int):
                    setattr(module, name, index)


def _hand_on_relative_bias(old: nn.Module, new: nn.Module) -> None:
    """T5's first layer holds the table of relative positions for all."""
    holders = [each for each in old.modules() if getattr(each, "has_relative_attention_bias", False)]
    for holder, heir in zip(holders, _of_class_of(holders, new), strict=False):
        heir.relative_attention_bias = holder.relative_attention_bias
        heir.has_relative_attention_bias = True


def _of_class_of(modules: list[nn.Module], within: nn.Module) -> list[Any]:
    return [each for each in within.modules() if any(type(each) is type(module) for module in modules)]


def _each_once(owners: Any) -> list[Any]:
    return list({id(owner): owner for owner in owners}.values())


def relink(model: nn.Module) -> None:
    """Put the borders between the fused layers that now follow one another."""
    fused = [module for module in model.modules() if isinstance(module, FusedLayer)]
    for module in fused:
        unlink(module)
    if fused:
        link_layers(model)
