"""transformers' side of it: a model is built with quantized layers, filled from float weights or quantized
ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from fastattn.compress.quantization.transformers_config import NAME, FastattnConfig

if TYPE_CHECKING:
    from fastattn.compress.quantization.settings import QuantizationSettings
    from fastattn.compress.quantization.targets import Target

__all__ = ["FastattnQuantizer"]


class FastattnQuantizer(HfQuantizer):
    """Builds `QuantizedLinear` layers into a model that `from_pretrained` is about to fill.

    A saved quantized model is filled with the tensors it was saved with. Of a float one every weight is
    quantized when it is read, and freed before the next.
    """

    quantization_config: FastattnConfig
    pre_quantized: bool

    def __init__(self, quantization_config: FastattnConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        # By name: what the layers being filled were, and those whose weight has not come yet.
        self._targets: dict[str, Target] = {}
        self._waiting: dict[str, Target] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        config = self.quantization_config
        if self.pre_quantized and config.layers is None:
            raise ValueError(
                "the model's quantization_config names no layers: it was not written by save_pretrained of a "
                "model that fastattn quantized"
            )
        if not self.pre_quantized and config.layers is not None:
            raise ValueError(
                "quantization_config names the layers of a saved quantized model, and this one is not "
                "quantized; pass FastattnConfig(scheme, ...) without layers"
            )

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """With adapters on top."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(self)

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        # Also asked of the quantized weight, whose shape may be another.
        return not self.pre_quantized and param_name.removesuffix(".weight") in self._targets

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        from fastattn.compress.quantization import loading

        if getattr(model.config, "fastattn_pruning", None) is not None:
            from fastattn.compress.pruning.saved import apply_shapes

            apply_shapes(model, model.config)
        if self.pre_quantized:
            loading.build_saved(model, self.quantization_config)
        else:
            self._targets = loading.build_empty(model, self.settings, self.quantization_config.exclude)
            self._waiting = dict(self._targets)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from fastattn.compress.quantization import loading

        if not self.pre_quantized:
            loading.finish(model, self.settings, self.quantization_config, self._waiting)
            self._targets, self._waiting = {}, {}
            self.pre_quantized = True
        loading.settle(model, self.quantization_config)
        # transformers refuses `.half()` and `.float()` of models it calls quantized; these layers take them.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def quantized(self, name: str, weight: Tensor, missing: set[str]) -> dict[str, Tensor]:
        """The tensors that take the place of the float `weight` of the parameter `name`; what `missing` holds
        of a layer that stays float is taken out.
        """
        from fastattn.compress.quantization import loading

        target = self._waiting.pop(name.removesuffix(".weight"), None)
        if target is None:
            return {name: weight}
        tensors = loading.filled(target, weight, self.settings)
        if len(tensors) == 1:
            missing -= {f"{name}_scale", f"{name}_zero_point"}
        return tensors

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        from fastattn.layers import dequantize_layers

        dequantize_layers(model, dtype)
        return model

    @property
    def settings(self) -> QuantizationSettings:
        from fastattn.compress.quantization.settings import QuantizationSettings

        config = self.quantization_config
        return QuantizationSettings(
            config.scheme,
            config.group_size,
            config.method,
            max_error=config.max_error,
            kv_cache=config.kv_cache,
        )


class _QuantizeWeight(ConversionOps):
    """Runs on one weight after it was read, renamed and merged."""

    def __init__(self, quantizer: FastattnQuantizer) -> None:
        self._quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        missing = set() if missing_keys is None else missing_keys
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            found |= self._quantizer.quantized(name, weight, missing)
        return found


if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantization_config(NAME)(FastattnConfig)
    register_quantizer(NAME)(FastattnQuantizer)
