"""How a family's attention layers, feed-forward layers and stacks are described: the names of their parts,
and from them the sites of a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.compress.pruning.structure import AttentionSite, FeedForwardSite, LayerStack, Part

__all__ = ["Attention", "Experts", "FeedForward", "Layout", "Stack", "TorchAttention", "layouts_of"]

# torch's product of grouped matrices, which runs experts, wants rows of a multiple of 16 bytes.
_GROUPED_PRODUCT = 8

JOINTS = ("", "blocks", "key and value", "by group")


@dataclass(frozen=True)
class Attention:
    """An attention class by the names of its parts; each "../" before a name is a layer further up.

    Attributes:
        head_dim: the attribute that holds it.
        output: the output projection. Its inputs say how many query heads there are.
        query, key, value: the projections; one name where a layer computes several.
        joint: how it does: "blocks" all queries, then all keys, then all values; "key and value" the same
            without the queries; "by group" the queries of a key head, the key and the value, and so on.
        kv_heads: the attribute that holds the number of key heads where `joint` leaves it open.
        attributes: as of `AttentionSite`.
        by_head: further parameters with a place a head, and the dimension it is in.
        by_width: further linear layers with `head_dim` outputs a head.
        linked: as of `AttentionSite`.
        alibi: the attribute that says whether there is ALiBi, or "always".
        only: an attribute without which a layer is not of this kind; "not ..." with which it is not.
    """

    head_dim: str
    output: str
    query: str
    key: str = ""
    value: str = ""
    joint: str = ""
    kv_heads: str = ""
    attributes: tuple[tuple[str, str], ...] = ()
    by_head: tuple[tuple[str, int], ...] = ()
    by_width: tuple[str, ...] = ()
    linked: bool = False
    alibi: str = ""
    only: str = ""

    def __post_init__(self) -> None:
        if self.joint not in JOINTS:
            raise ValueError(f"joint is {self.joint!r}; it must be one of {JOINTS}")

    def site(self, model: nn.Module, name: str, module: nn.Module) -> AttentionSite:
        head_dim = int(_attribute(module, self.head_dim))
        heads = _features(_find(model, name, self.output)[1])[0] // head_dim
        places = self._places(model, name, module, heads, head_dim)
        query, key, value = (
            _outputs(model, name, path or self.query, places[index], groups=index > 0)
            for index, path in enumerate((self.query, self.key, self.value or self.key))
        )
        others = [_outputs(model, name, path, places[0]) for path in self.by_width if _has(model, name, path)]
        for path, dim in self.by_head:
            if _has(model, name, path):
                owner, _, tensor = path.rpartition(".")
                full, holder = _find(model, name, owner)
                others.append(Part(holder, full, {tensor: dim}, _rows(heads, 1)))
        return AttentionSite(
            name=name,
            module=module,
            num_heads=heads,
            num_kv_heads=len(key.places),
            head_dim=head_dim,
            hidden_size=_features(query.owner)[0],
            query=query,
            key=key,
            value=value,
            output=_inputs(model, name, self.output, _rows(heads, head_dim)),
            others=tuple(others),
            attributes=dict(self.attributes),
            linked=_without_numbers(name) if self.linked else "",
            alibi=self.alibi == "always" or bool(self.alibi and _attribute(module, self.alibi)),
        )

    def _places(
        self, model: nn.Module, name: str, module: nn.Module, heads: int, head_dim: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the queries, the keys and the values among the outputs of the layers that compute them."""
        if not self.joint:
            kv_heads = _features(_find(model, name, self.key)[1])[1] // head_dim
            keys = _rows(kv_heads, head_dim)
            return _rows(heads, head_dim), keys, keys
        kv_heads = int(_attribute(module, self.kv_heads)) if self.kv_heads else heads
        width, kv_width = heads * head_dim, kv_heads * head_dim
        if self.joint == "by group":
            group = heads // kv_heads
            stride = (group + 2) * head_dim
            queries = _rows(kv_heads, group * head_dim, 0, stride).view(heads, head_dim)
            keys = _rows(kv_heads, head_dim, group * head_dim, stride)
            return queries, keys, keys + head_dim
        before = 0 if self.joint == "key and value" else width
        keys = _rows(kv_heads, head_dim, before)
        return _rows(heads, head_dim), keys, keys + kv_width


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward class, or a layer with a feed-forward part, by the names of its linear layers.

    With `joint`, `up` computes the gate and what it gates, in two blocks.
    """

    up: str
    down: str
    gate: str = ""
    joint: bool = False
    attributes: tuple[str, ...] = ()

    def site(self, model: nn.Module, name: str, module: nn.Module) -> FeedForwardSite:
        hidden_size, outputs = _features(_find(model, name, self.up)[1])
        width = outputs // 2 if self.joint else outputs
        neurons = _rows(width, 1)
        gate = _outputs(model, name, self.gate or self.up, neurons) if self.gate or self.joint else None
        up = _outputs(model, name, self.up, neurons + width if self.joint else neurons)
        down = _inputs(model, name, self.down, neurons)
        return FeedForwardSite(name, module, width, hidden_size, up, gate, down, self.attributes)


@dataclass(frozen=True)
class Experts:
    """Experts in tensors [experts, in, out], a gate's outputs and what it gates in turn. A neuron is that of
    every expert.
    """

    up: str
    up_bias: str
    down: str
    attributes: tuple[str, ...]

    def site(self, model: nn.Module, name: str, module: nn.Module) -> FeedForwardSite:
        hidden_size, outputs = getattr(module, self.up).shape[1:]
        neurons = _rows(outputs // 2, 1)
        tensors = {self.up: 2, self.up_bias: 1}
        gate, up = (Part(module, name, tensors, 2 * neurons + offset) for offset in (0, 1))
        down = Part(module, name, {self.down: 1}, neurons)
        return FeedForwardSite(
            name, module, outputs // 2, hidden_size, up, gate, down, self.attributes, _GROUPED_PRODUCT
        )


@dataclass(frozen=True)
class TorchAttention:
    """`torch.nn.MultiheadAttention`, whose projections are its own parameters."""

    def site(self, model: nn.Module, name: str, module: nn.Module) -> AttentionSite:
        attention: Any = module
        heads, head_dim = int(attention.num_heads), int(attention.head_dim)
        rows = _rows(heads, head_dim)
        width = heads * head_dim
        joint = attention.in_proj_weight is not None
        weights = ["in_proj_weight"] * 3 if joint else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        parts = [
            Part(module, name, {weight: 0}, rows + (index * width if joint else 0), groups=index > 0)
            for index, weight in enumerate(weights)
        ]
        others = []
        if attention.in_proj_bias is not None:
            others += [Part(module, name, {"in_proj_bias": 0}, rows + index * width) for index in range(3)]
        if attention.bias_k is not None:
            others.append(Part(module, name, {"bias_k": 2, "bias_v": 2}, rows))
        return AttentionSite(
            name=name,
            module=module,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=head_dim,
            hidden_size=int(attention.embed_dim),
            query=parts[0],
            key=parts[1],
            value=parts[2],
            output=_inputs(model, name, "out_proj", rows),
            others=tuple(others),
            attributes={"num_heads": "heads"},
        )


@dataclass(frozen=True)
class Stack:
    """A class that runs layers: the name of their list, and where their number is written down.

    Attributes:
        layers: the list of layers.
        counts: names of it in the stack's own configuration, or the model's where it has none.
        root_counts: names of it in the model's configuration where that is another (T5).
        own_counts: names of it among the stack's own attributes.
        lists: names of the configuration's lists with one entry a layer.
        repeats: the name in the configuration of how often the list is run, where it is more than once.
        first_stays: a reason why the first layer cannot go, and the attribute that makes it so ("" always).
        only: as of `Attention`.
    """

    layers: str
    counts: tuple[str, ...] = ()
    root_counts: tuple[str, ...] = ()
    own_counts: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    repeats: str = ""
    first_stays: tuple[str, str] = ("", "")
    only: str = ""

    def site(self, model: nn.Module, name: str, module: nn.Module) -> LayerStack:
        layers = module.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList)
        root = _outermost_config(model, name)
        config = getattr(module, "config", root)
        counts: list[tuple[Any, str]] = [(module, each) for each in self.own_counts]
        # A part's configuration may be a copy of that inside the model's.
        inner = [each for each in vars(root).values() if type(each) is type(config)] if root else []
        held = {id(each): each for each in (config, *inner)}.values()
        counts += [(each, count) for each in held for count in self.counts if hasattr(each, count)]
        counts += [(root, each) for each in self.root_counts if hasattr(root, each)]
        depth = int(getattr(config, self.repeats)) if self.repeats else len(layers)
        fixed = ""
        if getattr(model, "layer_weights", None) is not None:
            fixed = "the model weighs the outputs of all its layers (layer_weights)"
        if depth != len(layers) and len(layers) > 1:
            fixed = f"{len(layers)} layers take turns running {depth} times"
        reason, attribute = self.first_stays
        stays = reason if not attribute or getattr(module, attribute, None) is not None else ""
        full = f"{name}.{self.layers}" if name else self.layers
        return LayerStack(full, layers, module, depth, tuple(counts), self.lists, fixed, stays)


Layout = Attention | Experts | FeedForward | Stack | TorchAttention


def layouts_of(module: nn.Module) -> tuple[Layout, ...]:
    """What of `module` can be pruned: the table's entries for its class or the first of its bases there."""
    from fastattn.compress.pruning.families import LAYOUTS

    for base in type(module).__mro__:
        found = LAYOUTS.get(f"{base.__module__.rpartition('.')[2].removeprefix('modeling_')}.{base.__name__}")
        if found is not None and base.__module__.startswith(("transformers.models.", "torch.nn.")):
            return tuple(each for each in found if _is_kind(module, getattr(each, "only", "")))
    return ()


def _is_kind(module: nn.Module, only: str) -> bool:
    if only.startswith("not "):
        return not getattr(module, only.removeprefix("not "), False)
    return not only or bool(getattr(module, only, False))


def _rows(units: int, size: int, start: int = 0, stride: int | None = None) -> Tensor:
    """int64 [units, size]: unit u owns `size` places from `start + u * stride` on (default side by side)."""
    # On the CPU even where a caller builds models on the meta device.
    first = start + torch.arange(units, device="cpu") * (size if stride is None else stride)
    return first[:, None] + torch.arange(size, device="cpu")


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for step in path.split("."):
        value = getattr(value, step)
    return value


def _join(name: str, path: str) -> str:
    while path.startswith("../"):
        name, path = name.rpartition(".")[0], path[3:]
    return f"{name}.{path}" if name and path else name or path


def _find(model: nn.Module, name: str, path: str) -> tuple[str, nn.Module]:
    full = _join(name, path)
    return full, model.get_submodule(full)


def _has(model: nn.Module, name: str, path: str) -> bool:
    value: Any = model
    for step in _join(name, path).split("."):
        value = getattr(value, step, None)
    return value is not None


def _outermost_config(model: nn.Module, name: str) -> Any:
    """The configuration of the outermost module that has one around the module called `name`."""
    steps = name.split(".") if name else []
    for depth in range(len(steps) + 1):
        config = getattr(model.get_submodule(".".join(steps[:depth])), "config", None)
        if config is not None:
            return config
    return None


def _features(linear: nn.Module) -> tuple[int, int]:
    """How many features go in, and come out."""
    if hasattr(linear, "in_features"):
        return int(linear.in_features), int(linear.out_features)  # type: ignore[arg-type]
    weight: Any = linear.weight
    rows, columns = weight.shape
    return (rows, columns) if _is_transposed(linear) else (columns, rows)


def _is_transposed(linear: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, whose weight is [in, out]."""
    return any(base.__name__ == "Conv1D" for base in type(linear).__mro__)


def _outputs(model: nn.Module, name: str, path: str, places: Tensor, groups: bool = False) -> Part:
    full, linear = _find(model, name, path)
    tensors = {"weight": 1 if _is_transposed(linear) else 0}
    if getattr(linear, "bias", None) is not None:
        tensors["bias"] = 0
    return Part(linear, full, tensors, places, groups)


def _inputs(model: nn.Module, name: str, path: str, places: Tensor) -> Part:
    full, linear = _find(model, name, path)
    return Part(linear, full, {"weight": 0 if _is_transposed(linear) else 1}, places)


def _without_numbers(name: str) -> str:
    """The same for the same part of every layer of a stack."""
    return ".".join("*" if step.isdecimal() else step for step in name.split("."))
