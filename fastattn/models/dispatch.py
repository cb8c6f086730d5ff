"""Which attention layers ask transformers' attention interface for the function that computes them, why one
cannot be given ours, and in which form an architecture's layers take their mask.

Read from the layers' own code, so that an architecture fastattn has never heard of is judged by the same
rule.
"""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

__all__ = ["cannot_dispatch", "dispatches", "family_reason", "mask_form"]

# The name every dispatching forward looks the function up by.
_INTERFACE = "ALL_ATTENTION_FUNCTIONS"

# What a layer's eager function may take besides the module, query, key, value and mask: our function computes
# it.
_COMPUTED = frozenset(
    ("dropout", "scaling", "is_causal", "sliding_window", "softcap", "s_aux", "position_bias")
)

# What an eager function may name and still be the attention ours is: the formula, its dtypes, grouped
# queries, soft capping and sinks. One that names anything else computes something that ours may not.
_FORMULA = frozenset(
    (
        *("torch", "nn", "functional", "F", "matmul", "transpose", "softmax", "dropout", "contiguous"),
        *("dtype", "to", "type", "float", "float32", "size", "shape", "training", "head_dim", "hasattr"),
        *("getattr", "maybe_autocast", "device", "repeat_kv", "num_key_value_groups", "tanh", "sinks", "cat"),
        *("expand", "reshape", "view", "max", "values", "logsumexp", "sigmoid", "unsqueeze"),
    )
)

# A layer that computes attention names one of these.
_SCORES = frozenset(("softmax", "Softmax", "scaled_dot_product_attention"))

# Flash attention is given the padding mask as it is, [batch, keys]: an architecture that supports it hands
# that through. These do too and support none for the sake of their position bias alone.
_BIASED = frozenset(f"transformers.models.{name}.modeling_{name}" for name in ("t5", "mt5", "umt5"))


@cache
def dispatches(cls: type[Any]) -> bool:
    """Whether the layers of `cls` take their attention function from transformers' interface."""
    return _INTERFACE in _names(_forward(cls))


@cache
def cannot_dispatch(cls: type[Any]) -> str | None:
    """Why a class that dispatches still cannot use our attention function; None where it can.

    Its eager function is what it computes: one that takes or computes more than ours does is left alone.
    """
    forward = _forward(cls)
    if _INTERFACE not in _names(forward):
        return f"{cls.__name__} does not look up transformers' attention interface"
    eager = _eager_function(forward)
    if eager is None:
        return f"{cls.__name__} names no eager attention function, so what it computes is not known"
    if not isinstance(eager, FunctionType):
        return f"{eager!r} of {cls.__name__} is no Python function, so what it computes is not known"
    parameters = list(inspect.signature(eager).parameters.values())
    named = [each.name for each in parameters[5:] if each.kind is not inspect.Parameter.VAR_KEYWORD]
    more = sorted(set(named) - _COMPUTED)
    if more:
        return f"{eager.__name__} of {cls.__name__} takes {', '.join(more)}"
    if _reads_other_keywords(eager):
        return f"{eager.__name__} of {cls.__name__} reads keyword arguments it does not name"
    names = _names(eager)
    unknown = sorted(names - _FORMULA)
    if unknown:
        return f"{eager.__name__} of {cls.__name__} uses {', '.join(unknown)}"
    if "sinks" in names and "s_aux" not in _keywords(forward):
        return f"{cls.__name__} keeps its attention sinks from the attention function"
    return None


def family_reason(config: Any) -> str | None:
    """Why no layer of a configuration's architecture dispatches (the class will do, too).

    None where one does, where the architecture has no attention layers of its own, and where its modeling
    module is not loaded.
    """
    module = _modeling_module(config if isinstance(config, type) else type(config))
    return None if module is None else _no_dispatch(module)


def mask_form(config_class: type) -> str:
    """In which form the layers of an architecture take the mask they are handed.

    "padding": as flash attention does, two-dimensional where padding is all there is to hide, causality being
    the layer's `is_causal`. "boolean": four-dimensional, as SDPA does. "additive": four-dimensional, as the
    formula does; for an architecture some of whose layers compute attention themselves.
    """
    module = _modeling_module(config_class)
    return "boolean" if module is None else _mask_form(module)


def _modeling_module(config_class: type) -> ModuleType | None:
    """The loaded module beside a configuration's that defines its layers."""
    for base in config_class.__mro__:
        name = base.__module__
        module = sys.modules.get(name.replace("configuration_", "modeling_"))
        if "configuration_" in name and module is not None:
            return module
    return None


@cache
def _no_dispatch(module: ModuleType) -> str | None:
    if hasattr(module, _INTERFACE):
        return None
    names = sorted({each.__name__ for each in _layers(module) if "Attention" in each.__name__})
    if not names:
        return None
    return f"{names[0]} computes its attention itself, without transformers' attention interface"


@cache
def _mask_form(module: ModuleType) -> str:
    layers = list(_layers(module))
    dispatching = [each for each in layers if dispatches(each)]
    if not dispatching:
        return "boolean"
    if any("Att" in each.__name__ and _computes_attention(each) for each in layers):
        return "additive"
    models = [each for each in layers if hasattr(each, "_supports_flash_attn")]
    flash = all(each._supports_flash_attn for each in models) or module.__name__ in _BIASED
    if flash and not hasattr(module, "is_flash_attention_requested"):
        return "padding" if all(_says_whether_causal(each) for each in dispatching) else "boolean"
    return "boolean" if flash or all(each._supports_sdpa for each in models) else "additive"


def _says_whether_causal(cls: type[Any]) -> bool:
    if hasattr(cls, "is_causal") or "is_causal" in _keywords(_forward(cls)):
        return True
    return any("is_causal" in _names(vars(base).get("__init__")) for base in inspect.getmro(cls))


def _computes_attention(cls: Any) -> bool:
    if dispatches(cls):
        return False
    own = [each for each in vars(cls).values() if inspect.isfunction(each)]
    return any(not _SCORES.isdisjoint(_names(each)) for each in own)


def _layers(module: ModuleType) -> Iterator[Any]:
    for each in vars(module).values():
        if isinstance(each, type) and issubclass(each, nn.Module) and each.__module__ == module.__name__:
            yield each


def _forward(cls: type[nn.Module]) -> Any:
    """The forward that decides: a subclass's that only calls the one it overrides is looked through."""
    forward = None
    for base in cls.__mro__:
        if "forward" not in vars(base):
            continue
        forward = inspect.unwrap(vars(base)["forward"])
        names = _names(forward)
        if _INTERFACE in names or not {"super", "forward"} <= names:
            break
    return forward


def _eager_function(forward: Any) -> Any:
    """The function a dispatching forward falls back to."""
    found = [
        forward.__globals__[name]
        for name in sorted(_names(forward))
        if name.endswith("attention_forward") and callable(forward.__globals__.get(name))
    ]
    return found[0] if len(found) == 1 else None


def _reads_other_keywords(function: FunctionType) -> bool:
    code = function.__code__
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    position = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & inspect.CO_VARARGS)
    others = code.co_varnames[position]
    # One instruction may load two variables.
    return any(
        others in (each.argval if isinstance(each.argval, tuple) else (each.argval,))
        for each in dis.get_instructions(code)
        if each.opname.startswith("LOAD_")
    )


def _codes(function: Any) -> Iterator[CodeType]:
    code = getattr(function, "__code__", None)
    waiting = [] if code is None else [code]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [each for each in code.co_consts if isinstance(each, CodeType)]


def _names(function: Any) -> frozenset[str]:
    return frozenset(name for code in _codes(function) for name in code.co_names)


def _keywords(function: Any) -> frozenset[str]:
    """Names of the keyword arguments a function calls others with: constants of its code."""
    return frozenset(
        name
        for code in _codes(function)
        for names in code.co_consts
        if isinstance(names, tuple)
        for name in names
        if isinstance(name, str)
    )
