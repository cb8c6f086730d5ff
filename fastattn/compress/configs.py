"""The configs that modules of a transformers model hold, which another model may have been built from."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

__all__ = ["is_config", "own_configs"]


def own_configs(model: nn.Module) -> None:
    """Give the model copies of its configs: another model may have been built from the same ones."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if is_config(value):
                module.__dict__[name] = copy.deepcopy(value, memo)


def is_config(value: Any) -> bool:
    """Whether `value` is a model's or a generation config; transformers need not be loaded for that."""
    return any(
        base.__name__ in ("PreTrainedConfig", "PretrainedConfig", "GenerationConfig")
        for base in type(value).__mro__
    )
