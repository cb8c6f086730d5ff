"""Whether a submodule may be read through instead of called: only what is exactly PyTorch's own and
unobserved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["is_observed", "is_plain", "modules_below"]


def is_observed(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, or an instance forward put in its
    place.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or nn_module._has_any_global_hook()
    )


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether `module` is a `kind` itself, so that reading its parameters equals calling it.

    A LoRA wrapper, a quantized or parametrized layer, and a layer with hooks are not: they must be called.
    """
    return type(module) is kind and not is_observed(module) and not _is_wrapped(module)


def _is_wrapped(module: nn.Module) -> bool:
    """Whether a parameter is a tensor of another make (torchao's quantized ones, DTensor), which only the
    module's own forward is known to read right.
    """
    return any(
        type(each) is not nn.Parameter and is_traceable_wrapper_subclass(each)
        for each in module._parameters.values()
    )


def modules_below(module: nn.Module) -> Iterator[nn.Module]:
    """Every descendant of `module`. Unlike `Module.modules()` it builds no names and no set: it runs on every
    call.
    """
    for child in module._modules.values():
        if child is not None:
            yield child
            yield from modules_below(child)
