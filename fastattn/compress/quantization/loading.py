"""Quantized layers in a model on the meta device, before and while its weights are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.compress.quantization.layers import LayerQuantizer, packed_by
from fastattn.compress.quantization.originals import Originals
from fastattn.compress.quantization.projections import has_folded_projections, unfold_projections
from fastattn.compress.quantization.quantizing import (
    close_attention,
    guard_fast_paths,
    open_attention,
    quantize_targets,
)
from fastattn.compress.quantization.sensitivity import output_error
from fastattn.compress.quantization.settings import QuantizationSettings
from fastattn.compress.quantization.targets import (
    Target,
    check_exclude,
    find_targets,
    is_conv1d,
    is_open_attention,
)
from fastattn.compress.quantization.transformers_config import FastattnConfig
from fastattn.layers import QuantizedLinear
from fastattn.ops import PackedWeight

__all__ = ["build_empty", "build_saved", "filled", "finish", "settle"]


def build_saved(model: nn.Module, config: FastattnConfig) -> None:
    """Put empty quantized layers where the saved model had them; no float layer is ever filled.

    Raises:
        ValueError: none of the names is one of this model's.
    """
    assert config.layers is not None
    smoothed = set(config.smoothed)
    found = 0
    for saved in config.layers:
        name = _own_name(model, saved)
        if name is None:
            # A head, say, of which this class has another or none.
            continue
        parent_name, _, attribute = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        parent._modules[attribute] = _empty(
            parent._modules[attribute], config.scheme, config.group_size, saved in smoothed
        )
        found += 1
    if config.layers and not found:
        raise ValueError(
            f"none of the quantized layers the config names ({config.layers[0]}, ...) is in "
            f"{type(model).__name__}"
        )


def _own_name(model: nn.Module, saved: str) -> str | None:
    """The layer's name in this model, which may hold the saved one or be its base; an attention layer's
    projections are made layers on the way.
    """
    prefix = getattr(model, "base_model_prefix", "")
    for name in (saved, f"{prefix}.{saved}", saved.removeprefix(f"{prefix}.")):
        parent_name, _, attribute = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
        except AttributeError:
            continue
        if is_open_attention(parent) and has_folded_projections(parent):
            unfold_projections(parent)  # type: ignore[arg-type]
        if isinstance(parent._modules.get(attribute), nn.Module):
            return name
    return None


def _empty(layer: Any, scheme: str, group_size: int, input_scale: bool = False) -> QuantizedLinear:
    """A quantized layer without numbers in the place of `layer`, with its bias."""
    outputs, inputs = layer.weight.shape[::-1] if is_conv1d(layer) else layer.weight.shape
    size = group_size if scheme == "int4-weight" else inputs
    made = QuantizedLinear(inputs, outputs, scheme, size, False, input_scale, layer.weight.device)
    made.bias = layer.bias
    return made.train(layer.training)


def build_empty(
    model: nn.Module, settings: QuantizationSettings, exclude: Sequence[str]
) -> dict[str, Target]:
    """Put quantized layers that wait for a float weight into the model; gives what they were, by name.

    The projections of `nn.MultiheadAttention`, which are no layers in a float checkpoint, wait for `finish`.
    """
    check_exclude([name for name, _ in model.named_modules()], exclude)
    waiting = {}
    for target in find_targets(model, exclude):
        within = any(isinstance(parent, nn.MultiheadAttention) for parent, _ in target.places)
        if target.reason or within:
            continue
        layer = _empty(target.layer, settings.scheme, settings.group_size)
        # Until then its float weight has this name: of that shape and dtype it is read.
        layer.weight = target.layer.weight.detach()  # type: ignore[operator]
        for parent, attribute in target.places:
            parent._modules[attribute] = layer
        waiting[target.name] = target
    return waiting


def filled(target: Target, weight: Tensor, settings: QuantizationSettings) -> dict[str, Tensor]:
    """The tensors of the quantized layer at `target`, which has read its float weight, by their names; where
    its error is too large the float layer is put back.
    """
    name = target.name
    laid = weight.t() if target.kind == "conv1d" else weight
    packed = _packed(laid, settings)
    if packed is None:
        _put_float_back(target)
        return {f"{name}.weight": weight}
    tensors = {"weight": packed.values.view(torch.int8), "weight_scale": packed.scales}
    if packed.zero_points is not None:
        tensors["weight_zero_point"] = packed.zero_points
    return {f"{name}.{key}": tensor for key, tensor in tensors.items()}


def _packed(weight: Tensor, settings: QuantizationSettings) -> PackedWeight | None:
    if not bool(weight.isfinite().all()):
        return None
    packed, _ = packed_by(settings, weight)
    return packed if output_error(weight, packed) <= settings.limit else None


def _put_float_back(target: Target) -> None:
    parent, attribute = target.places[0]
    waited: Any = parent._modules[attribute]
    layer: Any = target.layer
    layer.bias = waited.bias
    for parent, attribute in target.places:
        parent._modules[attribute] = layer


@torch.no_grad()
def finish(
    model: nn.Module, settings: QuantizationSettings, config: FastattnConfig, waiting: dict[str, Target]
) -> None:
    """Quantize what came by no checkpoint (layers newly drawn) or as no layer (attention projections), and
    write down which layers are quantized.
    """
    for target in waiting.values():
        parent, attribute = target.places[0]
        layer: Any = parent._modules[attribute]
        packed = _packed(layer.weight.t() if target.kind == "conv1d" else layer.weight, settings)
        if packed is None:
            target.layer.weight = nn.Parameter(layer.weight)
            _put_float_back(target)
        else:
            layer.set_packed(packed)
    originals = Originals(keeps=False)
    attentions = [module for module in model.modules() if is_open_attention(module)]
    for attention in attentions:
        open_attention(attention, originals)
    inside = {id(each) for attention in attentions for each in attention.children()}
    targets = [each for each in find_targets(model, config.exclude) if id(each.layer) in inside]
    quantize_targets(model, targets, LayerQuantizer(settings, originals), None)
    for attention in attentions:
        close_attention(attention, originals)
    # How layers were judged is past.
    config.method, config.max_error = settings.rounding, None
    config.layers = [name for name, each in model.named_modules() if isinstance(each, QuantizedLinear)]


def settle(model: nn.Module, config: FastattnConfig) -> None:
    """Make a model whose quantized layers are filled ready to run."""
    joint = {
        id(module._modules["in_proj"])
        for module in model.modules()
        if is_open_attention(module) and "in_proj" in module._modules
    }
    for module in model.modules():
        if isinstance(module, QuantizedLinear) and id(module) not in joint:
            module.prepare()
    guard_fast_paths(model, Originals(keeps=False))
    if config.kv_cache is not None:
        from fastattn.compress.kv_cache import use_quantized_cache

        use_quantized_cache(model, config.kv_cache)
