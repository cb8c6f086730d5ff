"""Registers `attn_implementation="fastattn"` and the quantization method "fastattn" with transformers: at
once if it is loaded, else when it is.

Standard library only: `import fastattn` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register_with_transformers"]

# Defines the registry of attention functions, after that of quantizers; every model's module imports it.
_REGISTRY = "transformers.modeling_utils"

# What is registered -> the module that does so when imported.
_REGISTERED = {
    'attn_implementation="fastattn"': "fastattn.models.interface",
    'quantization method "fastattn"': "fastattn.compress.quantization.transformers_quantizer",
}


def register_with_transformers() -> None:
    """Called once, by `import fastattn`."""
    if _REGISTRY in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _Watcher())


def _register() -> None:
    for what, module in _REGISTERED.items():
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever is wrong with ours, transformers must still load
            warnings.warn(f"{what} is not available: {type(error).__name__}: {error}", stacklevel=2)


class _Watcher(MetaPathFinder):
    """Registers right after the registry's module has run, and is gone from then on."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _REGISTRY:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            del loader.exec_module
            run(module)
            _register()

        loader.exec_module = run_and_register
        return spec
