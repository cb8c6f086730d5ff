"""What the trace of a swapped model must hold, so that a layer or a packing that is lost on the way fails the
export, where it would only be slower.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastattn.layers import FusedLayer, QuantizedLinear
from fastattn.models.dispatch import dispatches
from fastattn.models.family import families_in
from fastattn.models.interface import NAME
from fastattn.models.packed import PackedRegion

__all__ = ["traced_operations"]


@dataclass(frozen=True)
class _Promise:
    """Operations a swapped layer becomes, by the kind of its site.

    Attributes:
        attention: the operation of an attention layer; None where it is PyTorch's own.
        residual_norm: `add_layer_norm`s of a layer that adds and normalizes.
        activation: what the MLP's activation becomes, and how often.
        first: how many norms fewer the first layer of a stack has: nothing is added before it.
        shared: whether one layer is run config.num_hidden_layers times.
    """

    attention: str | None = "varlen_attention"
    residual_norm: int = 1
    activation: dict[str, int] = field(default_factory=lambda: {"bias_gelu": 1})
    first: int = 0
    shared: bool = False


_BERT = _Promise()
_PROMISES = {
    **dict.fromkeys(("bert", "roberta", "xlm_roberta", "electra", "mpnet"), _BERT),
    "distilbert": _Promise(residual_norm=2),
    "albert": _Promise(residual_norm=2, shared=True),
    "deberta_v2": _Promise(attention=None),
    "modernbert": _Promise(residual_norm=2, activation={"gated_activation": 1}, first=1),
    "t5": _Promise(residual_norm=0, activation={}),
    "vit": _Promise("attention", residual_norm=2, first=1),
    "clip": _Promise("attention", residual_norm=2, first=1),
}


def traced_operations(fused: nn.Module) -> dict[str, int]:
    """How many of fastattn's operations, by name, the trace of a swapped encoder must hold at least.

    Layers that the caller left out of the swap, or that cannot be swapped, are not counted; nor is a model
    that is told to pad promised to be packed.
    """
    found: Counter[str] = Counter()
    modules = list(fused.modules())
    padded = any(isinstance(x, PackedRegion) and x.fastattn_padding == "padded" for x in modules)
    for family in families_in(fused):
        promise = _PROMISES.get(family.name)
        if promise is None:
            continue
        swapped = {
            name: site.kind
            for name, module in fused.named_modules()
            for site in family.sites
            if type(module) is site.replacement
        }
        kinds = Counter(swapped.values())
        config: Any = fused.config
        times = config.num_hidden_layers if promise.shared else 1
        attentions = kinds["attention"] + sum(_asks_the_interface(module) for module in modules)
        if promise.attention is not None and not _leaves_out_attention(fused):
            found["attention" if padded else promise.attention] += times * attentions
        stacks = {name.rpartition(".")[0] for name, kind in swapped.items() if kind == "residual_norm"}
        norms = promise.residual_norm * kinds["residual_norm"] - promise.first * len(stacks)
        found["add_layer_norm"] += times * norms
        for name, count in promise.activation.items():
            sites = [fused.get_submodule(name) for name, kind in swapped.items() if kind == "activation"]
            if name == "bias_gelu":
                # A quantized layer computes the GELU after it itself.
                sites = [each for each in sites if not _has_quantized(each)]
            found[name] += times * count * len(sites)
    return {name: count for name, count in found.items() if count > 0}


def _has_quantized(mlp: nn.Module) -> bool:
    return any(isinstance(each, QuantizedLinear) for each in mlp.children())


def _asks_the_interface(module: nn.Module) -> bool:
    """Whether it is an attention layer as it was, which gets our function from transformers' interface."""
    config = getattr(module, "config", None)
    return (
        not isinstance(module, FusedLayer)
        and dispatches(type(module))  # type: ignore[arg-type]  # mypy finds no hash in a class of modules
        and getattr(config, "_attn_implementation", None) == NAME
    )


def _leaves_out_attention(fused: nn.Module) -> bool:
    """Whether an attention layer is not swapped, beside which none is packed."""
    originals = {
        site.replacement.fastattn_original
        for family in families_in(fused)
        for site in family.sites
        if site.kind == "attention"
    }
    return any(type(module) in originals for module in fused.modules())
