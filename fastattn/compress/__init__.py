"""Smaller models: quantized, pruned, and trained back to what they could do."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.compress.pruning import prune
    from fastattn.compress.quantization import FastattnConfig, quantize
    from fastattn.compress.recovery import recover
    from fastattn.compress.sweep_run import sweep
    from fastattn.compress.vocabulary import trim_vocabulary

# Imported on first use: quantizing takes neither the harness nor a Trainer.
_PUBLIC = {
    "FastattnConfig": "fastattn.compress.quantization",
    "prune": "fastattn.compress.pruning",
    "quantize": "fastattn.compress.quantization",
    "recover": "fastattn.compress.recovery",
    "sweep": "fastattn.compress.sweep_run",
    "trim_vocabulary": "fastattn.compress.vocabulary",
}

__all__ = ["FastattnConfig", "prune", "quantize", "recover", "sweep", "trim_vocabulary"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastattn.compress' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
