"""What an adapter declares about an architecture, and the registry that finds the adapter of a module."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module

from torch import nn

from fastattn.layers import FusedLayer

__all__ = ["KINDS", "Family", "Site", "families_in", "known_families", "load_family"]

KINDS = ("attention", "residual_norm", "norm", "activation", "encoder")

# Module that defines an architecture's layers -> the adapter for it. An adapter is imported only once a model
# holds such a layer, so that transformers, or this part of it, is then loaded already.
_ADAPTERS = {
    "torch.nn.modules.transformer": "fastattn.models.torch_nn",
    "torch.nn.modules.activation.MultiheadAttention": "fastattn.models.torch_nn",
    **{
        f"transformers.models.{name}.modeling_{name}": f"fastattn.models.{name}"
        for name in (
            "albert",
            "bart",
            "bert",
            "bloom",
            "clip",
            "deberta_v2",
            "distilbert",
            "electra",
            "falcon",
            "gemma2",
            "gemma3",
            "gpt2",
            "gpt_neo",
            "gpt_neox",
            "gpt_oss",
            "gptj",
            "llama",
            "marian",
            "mbart",
            "mistral",
            "modernbert",
            "mpnet",
            "opt",
            "pegasus",
            "phi",
            "qwen2",
            "qwen3",
            "roberta",
            "t5",
            "vit",
            "whisper",
            "xlm_roberta",
        )
    },
}


@dataclass(frozen=True)
class Site:
    """A class of layer that can be swapped: what kind it is and what takes its place.

    "attention" is an attention layer's own forward; "residual_norm" a layer that adds to the residual stream
    and normalizes it (in decoders the whole layer); "norm" a norm alone; "activation" an MLP or the part of
    it around its activation; "encoder" a stack of layers that runs without padding.

    `name` is the end of the module's name in the model, where the class alone does not tell the layer.
    """

    kind: str
    replacement: type[FusedLayer]
    name: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {KINDS}")


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: the adapter's module and transformers' model type.
        attention: in words, what its attention is: positions, grouped queries, caps, windows, sinks.
        sites: its layers that are swapped. Attention layers that ask transformers' attention interface need
            no site: their configuration is switched to our function.
        limits: what of the architecture is left as it is, and why, one sentence each.
    """

    name: str
    attention: str
    sites: tuple[Site, ...]
    limits: tuple[str, ...] = ()


@cache
def _load(adapter: str) -> Family:
    family: Family = import_module(adapter).FAMILY
    return family


def known_families() -> tuple[str, ...]:
    """Names of the supported architectures, without loading their adapters."""
    return tuple(sorted({adapter.rpartition(".")[2] for adapter in _ADAPTERS.values()}))


def load_family(name: str) -> Family:
    """The adapter called `name`, one of `known_families()`; it imports the architecture's modeling code."""
    return _load(f"fastattn.models.{name}")


def families_in(model: nn.Module) -> tuple[Family, ...]:
    """The adapters of the layers in `model`, subclasses of known layers included."""
    bases = {base for module in model.modules() for base in type(module).__mro__}
    origins = {base.__module__ for base in bases} | {
        f"{base.__module__}.{base.__qualname__}" for base in bases
    }
    return tuple(dict.fromkeys(_load(adapter) for origin, adapter in _ADAPTERS.items() if origin in origins))
