"""Where the heads, the neurons and the layers of a model are: what pruning removes, found by a table of
families and described in one way for all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AttentionSite", "FeedForwardSite", "LayerStack", "Part", "Structure", "sites"]


@dataclass(frozen=True, eq=False)
class Part:
    """The places of one tensor, or of a linear layer's inputs or outputs, that heads or neurons own.

    Attributes:
        owner: the module that holds the tensors.
        name: its name in the model.
        tensors: the parameters that lose places, each with the dimension they are counted in; a dimension
            counts as `torch.index_select`'s. Of a linear layer's outputs, the weight's and the bias's.
        places: int64 [units, places a unit], the places of each head, key head or neuron.
        groups: whether the units are key heads, not query heads.
    """

    owner: nn.Module
    name: str
    tensors: Mapping[str, int]
    places: Tensor
    groups: bool = False

    def tensor(self, name: str) -> Tensor:
        """The values of one of `tensors`, the units' places first: [units, places a unit, ...], a copy."""
        values: Tensor = getattr(self.owner, name)
        places = self.places.to(values.device)
        rows = values.detach().movedim(self.tensors[name], 0)[places.flatten()]
        return rows.view(*places.shape, *rows.shape[1:])

    def weight(self) -> Tensor:
        """The first of `tensors`, the weight: float32 or wider [units, places a unit, all else]."""
        values = self.tensor(next(iter(self.tensors)))
        return values.flatten(2).to(torch.promote_types(values.dtype, torch.float32))


@dataclass(frozen=True, eq=False)
class AttentionSite:
    """One attention layer.

    Attributes:
        name: of `module` in the model.
        module: the layer that splits its projections in heads.
        num_heads: query heads; head h reads key head h // (num_heads // num_kv_heads).
        num_kv_heads: key and value heads, those that grouped queries share; `num_heads` where none do.
        head_dim: features of a query head.
        hidden_size: features that go in.
        query, key, value: the projections, which may be places of one layer.
        output: the output projection, whose inputs are the heads' outputs side by side, by query head.
        others: what else has places by head: a table of relative positions, sinks.
        attributes: the numbers the layer keeps about itself, and which of the sizes each is: "heads",
            "kv_heads", "group" (query heads a key head) or "width" (heads * head_dim).
        linked: sites with the same name here keep the same heads: they share a bias that is made by head.
            Empty where a site stands for itself.
        alibi: whether the heads' slopes come with the call, by the heads there were before any was removed.
    """

    name: str
    module: nn.Module
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    query: Part
    key: Part
    value: Part
    output: Part
    others: tuple[Part, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    linked: str = ""
    alibi: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.query, self.key, self.value, self.output, *self.others)

    @property
    def group(self) -> int:
        """Query heads a key head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True, eq=False)
class FeedForwardSite:
    """One feed-forward layer: `down(activation(up(x)))`, or `down(activation(gate(x)) * up(x))`.

    Attributes:
        name: of `module` in the model.
        module: the layer that holds the others, or their common parent.
        width: its neurons.
        hidden_size: features that go in.
        up, gate, down: the linear layers; `gate` is None where there is none; gate and up may be places of
            one layer. The neurons are up's and gate's outputs and down's inputs.
        attributes: names of the numbers the layer keeps of its width.
        multiple: of what the width must stay a multiple.
    """

    name: str
    module: nn.Module
    width: int
    hidden_size: int
    up: Part
    gate: Part | None
    down: Part
    attributes: tuple[str, ...] = ()
    multiple: int = 1

    @property
    def parts(self) -> tuple[Part, ...]:
        return (self.up, self.down) if self.gate is None else (self.up, self.gate, self.down)

    def removable(self, wanted: int) -> int:
        """The most neurons that can be removed where `wanted` are asked for."""
        kept = -(-(self.width - wanted) // self.multiple) * self.multiple
        return max(self.width - kept, 0)


@dataclass(frozen=True, eq=False)
class LayerStack:
    """Layers one after another, of which some can go.

    Attributes:
        name: of `layers` in the model.
        layers: the list that holds them.
        owner: the module that runs them.
        depth: how many run: more than `layers` holds where one is run again and again (ALBERT).
        counts: the numbers of layers that change with it: a configuration, or module, and an attribute.
        lists: names of the lists with one entry a layer that the configurations among `counts` have.
        fixed: why no layer can go; empty where one can.
        first_stays: why the first layer cannot go; empty where it can.
    """

    name: str
    layers: nn.ModuleList
    owner: nn.Module
    depth: int
    counts: tuple[tuple[Any, str], ...] = ()
    lists: tuple[str, ...] = ()
    fixed: str = ""
    first_stays: str = ""

    @property
    def repeats(self) -> bool:
        """Whether its layers are one, run again and again: which of them goes makes no difference."""
        return self.depth != len(self.layers)


@dataclass(frozen=True, eq=False)
class Structure:
    """All that can be pruned of a model, each in the order `named_modules` gives."""

    attentions: tuple[AttentionSite, ...]
    feed_forwards: tuple[FeedForwardSite, ...]
    stacks: tuple[LayerStack, ...]

    @property
    def blocks(self) -> tuple[AttentionSite | FeedForwardSite, ...]:
        """What is cut in parts: attention layers, then feed-forward layers."""
        return (*self.attentions, *self.feed_forwards)


def sites(model: nn.Module) -> Structure:
    """The attention layers, feed-forward layers and stacks of layers of `model`, shared ones once.

    Example:
        >>> import transformers
        >>> from fastattn.compress.pruning.structure import sites
        >>> config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> found = sites(transformers.BertModel(config))
        >>> [(site.name, site.num_heads, site.head_dim) for site in found.attentions]
        [('encoder.layer.0.attention.self', 4, 16), ('encoder.layer.1.attention.self', 4, 16)]
        >>> found.feed_forwards[0].width, found.stacks[0].depth
        (3072, 2)
    """
    from fastattn.compress.pruning.layouts import layouts_of

    attentions: list[AttentionSite] = []
    feed_forwards: list[FeedForwardSite] = []
    stacks: list[LayerStack] = []
    for name, module in model.named_modules():
        for layout in layouts_of(module):
            site = layout.site(model, name, module)
            if isinstance(site, AttentionSite):
                attentions.append(site)
            elif isinstance(site, FeedForwardSite):
                feed_forwards.append(site)
            else:
                stacks.append(site)
    return Structure(tuple(attentions), tuple(feed_forwards), tuple(stacks))
