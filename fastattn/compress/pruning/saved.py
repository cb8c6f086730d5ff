"""Shapes that pruning left, written into the configuration and read back before weights are loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fastattn.compress.pruning.ffn import remove_neurons
from fastattn.compress.pruning.heads import KeptSlopes, kept_slopes, remove_heads
from fastattn.compress.pruning.structure import sites

__all__ = ["apply_shapes", "load_pruned", "record_shapes", "saved_models", "shapes_of"]

ATTRIBUTE = "fastattn_pruning"
_VERSION = 1


def shapes_of(model: nn.Module) -> dict[str, Any]:
    """The sizes of the model's attention and feed-forward layers, plain JSON: what `apply_shapes` takes.

    Names are those below the model without its head, so that a folder can be loaded with another head.
    """
    heads: dict[str, Any] = {}
    structure = sites(model)
    for site in structure.attentions:
        entry: dict[str, Any] = {"heads": site.num_heads, "kv_heads": site.num_kv_heads}
        slopes = kept_slopes(site.module)
        if slopes is not None:
            entry |= {"slopes": slopes.heads, "slopes_of": slopes.total}
        heads[_below_head(model, site.name)] = entry
    neurons = {_below_head(model, site.name): site.width for site in structure.feed_forwards}
    return {"version": _VERSION, "attention": heads, "feed_forward": neurons}


def saved_models(model: nn.Module) -> dict[str, nn.Module]:
    """The transformers models in `model`, itself perhaps, that are saved with a configuration of their own:
    by name, those inside another left out.
    """
    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and not any(_within(name, outer) for outer in found):
            found[name] = module
    return found


def _within(name: str, outer: str) -> bool:
    return not outer or name.startswith(f"{outer}.")


def record_shapes(model: nn.Module, positions: Mapping[str, list[int]]) -> None:
    """Write the model's shapes into its configuration, or those of the transformers models in it.

    Args:
        positions: of each stack of layers, by name, which of the layers there were before are left.
    """
    for outer, inner in saved_models(model).items():
        config: Any = inner.config
        before: dict[str, list[int]] = getattr(config, ATTRIBUTE, {}).get("layers", {})
        layers = dict(before)
        for name, kept in positions.items():
            if _within(name, outer):
                key = _below_head(inner, name.removeprefix(f"{outer}."))
                earlier = before.get(key)
                layers[key] = [earlier[index] for index in kept] if earlier else list(kept)
        setattr(config, ATTRIBUTE, {**shapes_of(inner), "layers": layers})


def apply_shapes(model: nn.Module, config: Any) -> None:
    """Give a model that was built from `config` the shapes it was saved with; what is kept of its weights is
    to be loaded over.

    Works on the meta device, and does nothing to a model that has the shapes already or was never pruned.

    Args:
        model: built from the configuration: its numbers of layers are right, its heads and neurons not.
        config: its configuration, or what `shapes_of` gave.

    Raises:
        ValueError: shapes of a later version, or of layers that `model` does not have or has smaller.
    """
    shapes = config if isinstance(config, Mapping) else getattr(config, ATTRIBUTE, None)
    if not shapes:
        return
    if shapes.get("version") != _VERSION:
        raise ValueError(
            f"{ATTRIBUTE} has version {shapes.get('version')}; this version of fastattn reads {_VERSION}"
        )
    structure = sites(model)
    heads, neurons = {}, {}
    for site in structure.attentions:
        entry = shapes["attention"].get(_below_head(model, site.name))
        if entry is None:
            continue
        if entry["heads"] > site.num_heads or entry["kv_heads"] > site.num_kv_heads:
            raise ValueError(
                f"{site.name!r} has {site.num_heads} heads and {site.num_kv_heads} key heads; {ATTRIBUTE} "
                f"says {entry['heads']} and {entry['kv_heads']}"
            )
        group = entry["heads"] // entry["kv_heads"]
        kept = {g * site.group + each for g in range(entry["kv_heads"]) for each in range(group)}
        if len(kept) < site.num_heads:
            heads[site] = [head for head in range(site.num_heads) if head not in kept]
    for feed_forward in structure.feed_forwards:
        width = shapes["feed_forward"].get(_below_head(model, feed_forward.name), feed_forward.width)
        if width > feed_forward.width:
            raise ValueError(
                f"{feed_forward.name!r} has {feed_forward.width} neurons; {ATTRIBUTE} says {width}"
            )
        if width < feed_forward.width:
            neurons[feed_forward] = range(width, feed_forward.width)
    remove_heads(model, heads)
    remove_neurons(neurons)
    for site in structure.attentions:
        entry = shapes["attention"].get(_below_head(model, site.name), {})
        if "slopes" in entry:
            KeptSlopes.of(site.module, entry["slopes_of"]).heads = list(entry["slopes"])
    _rescale(model, shapes.get("layers", {}))


def _rescale(model: nn.Module, layers: Mapping[str, list[int]]) -> None:
    """GPT-2 may divide its scores by the layer's number, which is that it was trained with."""
    for name, module in model.named_modules():
        if getattr(module, "scale_attn_by_inverse_layer_idx", False):
            attention: Any = module
            for stack, kept in layers.items():
                if _below_head(model, name).startswith(f"{stack}."):
                    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
                    attention.scaling = scale / float(kept[attention.layer_idx] + 1)


def load_pruned(folder: Any) -> Any:
    """The transformers model that was pruned and saved with `save_pretrained`, in eval mode.

    Raises:
        ValueError: the folder's model was not pruned, its architecture is not in transformers, or weights are
            missing.
    """
    import transformers

    path = Path(folder)
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if not getattr(config, ATTRIBUTE, None):
        raise ValueError(f"{path} holds no pruned model: its config.json has no {ATTRIBUTE}")
    architecture = (config.architectures or [""])[0]
    original = getattr(transformers, architecture, None)
    if original is None:
        raise ValueError(f"{path} holds a {architecture}, which is no class of transformers")
    model, found = _shaped_class(original).from_pretrained(
        path, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"{path} does not hold all of the pruned model's weights: {', '.join(missing[:4])}")
    model.__class__ = original
    return model.eval()


def _shaped_class(original: type[nn.Module]) -> Any:
    """A subclass that has the saved shapes as soon as it is built; transformers loads it as any other."""

    def build(self: nn.Module, config: Any, *args: Any, **kwargs: Any) -> None:
        original.__init__(self, config, *args, **kwargs)
        apply_shapes(self, config)

    # transformers looks at the module a class is defined in.
    body = {"__init__": build, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), body)


def _below_head(model: nn.Module, name: str) -> str:
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and isinstance(getattr(model, prefix, None), nn.Module):
        return name.removeprefix(f"{prefix}.")
    return name
