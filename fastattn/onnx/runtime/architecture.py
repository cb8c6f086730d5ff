"""What transformers knows of an exported model's original class: its outputs, arguments and `generate`."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from functools import lru_cache
from typing import Any

import transformers
from transformers.utils import ModelOutput

__all__ = ["forward_parameters", "generation_base", "original_class", "output_class"]


def original_class(architecture: str) -> Any:
    """The class of that name in transformers; None for one that is not there."""
    found = getattr(transformers, architecture, None)
    return found if isinstance(found, type) else None


@lru_cache
def forward_parameters(architecture: str) -> tuple[str, ...]:
    """Names of the arguments of the original's forward, in order; () where the class is unknown."""
    original = original_class(architecture)
    if original is None:
        return ()
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(original.forward).parameters.values()
    return tuple(each.name for each in parameters if each.kind not in variadic and each.name != "self")


@lru_cache
def output_class(architecture: str, names: tuple[str, ...]) -> Any:
    """The ModelOutput that the original's forward is annotated to return, with fields for all of `names`.

    Fields that the original's does not have are added to a class of the same name; an unknown original gets
    a class of these fields alone.
    """
    original = original_class(architecture)
    base: Any = ModelOutput
    if original is not None:
        annotation = inspect.signature(original.forward).return_annotation
        if isinstance(annotation, str):
            annotation = typing.get_type_hints(original.forward).get("return")
        for each in (annotation, *typing.get_args(annotation)):
            if isinstance(each, type) and issubclass(each, ModelOutput):
                base = each
    known = {field.name for field in dataclasses.fields(base)} if dataclasses.is_dataclass(base) else set()
    missing = [name for name in names if name not in known]
    if not missing:
        return base
    name = base.__name__ if known else f"{architecture}Output"
    return dataclasses.make_dataclass(
        name,
        [(each, Any, dataclasses.field(default=None)) for each in missing],
        bases=(base,),
        namespace={"__module__": __name__},
    )


def generation_base(architecture: str) -> type:
    """The class the original has `generate` of: GenerationMixin, or what a family made of it (Whisper)."""
    mixin, model = transformers.GenerationMixin, transformers.PreTrainedModel
    for each in getattr(original_class(architecture), "__mro__", ()):
        if issubclass(each, mixin) and not issubclass(each, model):
            return typing.cast(type, each)
    return typing.cast(type, mixin)
