"""Make the Transformer models you already have run fast: swap fused layers in, measure, export to ONNX."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastattn.registration import register_with_transformers

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastattn import compress, layers, ops
    from fastattn.backend import BackendError, set_backend
    from fastattn.bench import benchmark
    from fastattn.compress.pruning import prune
    from fastattn.compress.quantization import quantize
    from fastattn.onnx import export, load
    from fastattn.swap import optimize, optimized, restore
    from fastattn.verification import VerificationError, verify

# Public name -> the module that defines it, imported on first use: `import fastattn` loads neither torch nor
# transformers. A name that is itself a module of the package stands for that module.
_PUBLIC = {
    "BackendError": "fastattn.backend",
    "VerificationError": "fastattn.verification",
    "benchmark": "fastattn.bench",
    "compress": "fastattn.compress",
    "export": "fastattn.onnx",
    "layers": "fastattn.layers",
    "load": "fastattn.onnx",
    "ops": "fastattn.ops",
    "optimize": "fastattn.swap",
    "optimized": "fastattn.swap",
    "prune": "fastattn.compress.pruning",
    "quantize": "fastattn.compress.quantization",
    "restore": "fastattn.swap",
    "set_backend": "fastattn.backend",
    "verify": "fastattn.verification",
}

__all__ = [
    "BackendError",
    "VerificationError",
    "__version__",
    "benchmark",
    "compress",
    "export",
    "layers",
    "load",
    "ops",
    "optimize",
    "optimized",
    "prune",
    "quantize",
    "restore",
    "set_backend",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fastattn' has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    value = module if _PUBLIC[name] == f"fastattn.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register_with_transformers()
