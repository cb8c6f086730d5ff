"""What a quantized transformers model says of itself, so that it saves, loads and is used as one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from fastattn.compress.quantization.originals import Originals
from fastattn.compress.quantization.settings import QuantizationSettings
from fastattn.compress.quantization.transformers_config import FastattnConfig
from fastattn.compress.quantization.transformers_quantizer import FastattnQuantizer
from fastattn.layers import QuantizedLinear
from fastattn.swap import ORIGINAL_CONFIG

__all__ = ["describe"]


def describe(
    model: nn.Module, settings: QuantizationSettings, exclude: Sequence[str], originals: Originals
) -> None:
    """Put the quantization into the model's config, a copy of its own; other models are left alone."""
    if not isinstance(model, PreTrainedModel):
        return
    layers = {name: each for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}
    if not layers:
        return
    described = FastattnConfig(
        settings.scheme,
        settings.group_size,
        settings.rounding,
        exclude,
        kv_cache=settings.kv_cache,
        layers=list(layers),
        smoothed=[name for name, each in layers.items() if each.weight_input_scale is not None],
    )
    # Two models may have been built from one config. Configs within it stay the parts' own.
    for before in (model.config, model.__dict__.get(ORIGINAL_CONFIG)):
        if before is not None:
            config: Any = copy.copy(before)
            config.quantization_config = described
            originals.configs.append((config, before))
    originals.exchange_configs(model, {id(before): config for config, before in originals.configs})
    originals.set_attribute(model, "hf_quantizer", FastattnQuantizer(described, pre_quantized=True))
    originals.set_attribute(model, "quantization_method", described.quant_method)
