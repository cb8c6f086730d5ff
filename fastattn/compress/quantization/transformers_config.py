"""`FastattnConfig`: what `quantization_config=` and a saved model's config.json say of its quantization."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["NAME", "FastattnConfig"]

NAME = "fastattn"


class FastattnConfig(QuantizationConfigMixin):
    """How a transformers model is quantized.

    Given to `from_pretrained(..., quantization_config=)`, float weights are quantized as they are read, so
    that memory never holds the float model. In the config.json of a saved model it says which layers are.

    Args:
        scheme: "int8", "int8-weight", "int4-weight" or "fp8".
        group_size, method, max_error, kv_cache: as `fastattn.quantize` has them. "gptq" needs batches to run
            the model on, and `faster_at` a float model to time: both are `fastattn.quantize`'s alone.
        exclude: names of modules that stay, with shell wildcards.
        layers: names of the quantized layers of a saved model; None in a request.
        smoothed: those of them that divide their inputs by a scale of their own.

    Raises:
        ValueError: a value that is none of the accepted.

    Example:
        >>> FastattnConfig("int4-weight", group_size=128).to_dict()["quant_method"]
        'fastattn'
    """

    def __init__(
        self,
        scheme: str,
        group_size: int = 64,
        method: str = "auto",
        exclude: Sequence[str] = (),
        max_error: float | None = None,
        kv_cache: str | None = None,
        layers: Sequence[str] | None = None,
        smoothed: Sequence[str] = (),
        quant_method: str = NAME,
    ) -> None:
        from fastattn.compress.quantization.settings import QuantizationSettings

        if quant_method != NAME:
            raise ValueError(f"quant_method is {quant_method!r}; a FastattnConfig's is {NAME!r}")
        # Of a saved model, how its layers were rounded is past.
        QuantizationSettings(
            scheme,
            group_size,
            method,
            max_error=max_error,
            kv_cache=kv_cache,
            calibrated=layers is not None,
        )
        self.quant_method: Any = quant_method
        self.scheme = scheme
        self.group_size = group_size
        self.method = method
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.max_error = max_error
        self.kv_cache = kv_cache
        self.layers = None if layers is None else list(layers)
        self.smoothed = list(smoothed)
