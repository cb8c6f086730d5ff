"""Quantized linear layers: `fastattn.quantize`, its report, and what saves and loads them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.compress.quantization.quantizing import quantize
    from fastattn.compress.quantization.report import QuantizationReport, QuantizedLayerReport
    from fastattn.compress.quantization.transformers_config import FastattnConfig

# Imported on first use: the quantizer is registered while transformers itself is being imported.
_PUBLIC = {
    "FastattnConfig": "fastattn.compress.quantization.transformers_config",
    "QuantizationReport": "fastattn.compress.quantization.report",
    "QuantizedLayerReport": "fastattn.compress.quantization.report",
    "quantize": "fastattn.compress.quantization.quantizing",
}

__all__ = ["FastattnConfig", "QuantizationReport", "QuantizedLayerReport", "quantize"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
