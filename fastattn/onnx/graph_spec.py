"""What a source hands to the exporter: the graphs to make of a model, and what each must look like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

__all__ = ["KINDS", "GraphSpec", "Source", "one_or_list"]

KINDS = ("encoder", "vision", "decoder", "encoder-decoder", "module")


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX graph to be made.

    Attributes:
        name: of its file, without ".onnx".
        module: in eval mode; called with `inputs` as keyword arguments, it returns tensors (a tuple, a dict
            or a ModelOutput of them) in the order of `outputs`.
        inputs: the example to trace with. No dynamic size is 1, and no two that differ in name are equal:
            either would be taken for fixed.
        dimensions: for every input the names of its dimensions, or their sizes where they are fixed. One name
            is one size everywhere; "a + b" is the sum of two others.
        outputs: names of the outputs.
        limits: the largest size of a dimension, by its name.
        defaults: an integer that fills an input left out by a caller; inputs not named here must be given.
        value_limits: an integer input's values lie below this.
        output_dimensions: names of the outputs' dimensions where they are worth telling, as `dimensions`.
        promised: fused nodes this graph must hold besides those the traced operations become, by kind.
        traced: operations of fastattn's, by name, that the trace must hold at least.
        finish: rewrites of the source's own, after translation and `rewrites.rewrite`; returns fusions by
            kind.
        fixes_sizes: whether the module may fix a dimension that `dimensions` names (a user's own may).
    """

    name: str
    module: nn.Module
    inputs: dict[str, Tensor]
    dimensions: dict[str, tuple[str | int, ...]]
    outputs: tuple[str, ...]
    limits: dict[str, int] = field(default_factory=dict)
    defaults: dict[str, int] = field(default_factory=dict)
    value_limits: dict[str, int] = field(default_factory=dict)
    output_dimensions: dict[str, tuple[str | int, ...]] = field(default_factory=dict)
    promised: dict[str, int] = field(default_factory=dict)
    traced: dict[str, int] = field(default_factory=dict)
    finish: Callable[[Any], dict[str, int]] | None = None
    fixes_sizes: bool = False

    def __post_init__(self) -> None:
        if set(self.dimensions) != set(self.inputs):
            raise ValueError(f"dimensions names {sorted(self.dimensions)}, inputs {sorted(self.inputs)}")
        for name, tensor in self.inputs.items():
            if tensor.dim() != len(self.dimensions[name]):
                raise ValueError(f"{name} is {list(tensor.shape)}, its dimensions {self.dimensions[name]}")


@dataclass(frozen=True)
class Source:
    """A model as it is exported and as it is compared with; both share the user's parameters if they can.

    Attributes:
        kind: one of `KINDS`.
        task: what a Hugging Face model's head is for, in optimum's words; None for a module of one's own.
        architecture: the model's class.
        config: the user's config without any trace of the swap; None for a module of one's own.
        fused: swapped, in eval mode.
        reference: the same weights on the original layers, in eval mode.
        graphs: what is to be made of `fused`.
        cache: of decoders, "layers", "kv_heads", "key_dim" and "value_dim" (of every layer, or a list of each
            layer's), and "cross_heads" where there is an encoder.
        generation_config: saved beside the model, for decoders.
        original: the user's own object where the graphs are made of a part of it: a SentenceTransformer,
            whose other files a layout may want.
    """

    kind: str
    task: str | None
    architecture: str
    config: Any | None
    fused: nn.Module
    reference: nn.Module
    graphs: tuple[GraphSpec, ...]
    cache: dict[str, Any] | None = None
    generation_config: Any | None = None
    original: Any | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")


def one_or_list(sizes: list[int]) -> int | list[int]:
    """The size every layer has, or each layer's where they differ: as `Source.cache` has them."""
    return sizes[0] if len(set(sizes)) == 1 else sizes
