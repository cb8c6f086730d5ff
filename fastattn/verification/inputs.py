"""The inputs a user gives, checked before anything runs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fastattn.verification.batches import forward_parameters
from fastattn.verification.state import device_of

__all__ = ["checked_inputs"]

# What transformers' models take beside the parameters their forward names.
_OPTIONS = frozenset(
    (
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "use_cache",
        "position_ids",
        "is_causal",
        "num_items_in_batch",
    )
)
# A name that ends like this holds whole numbers.
_INDICES = ("input_ids", "position_ids", "token_type_ids")


def checked_inputs(model: nn.Module, inputs: Any) -> dict[str, Any]:
    """The inputs as a dict of their own.

    Raises:
        TypeError: they are no mapping, lack an argument, hold one that forward does not take, or one of a
            wrong type.
        ValueError: a tensor is on another device than the model.
    """
    if not isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}; a mapping of argument names to tensors is accepted"
        )
    parameters = forward_parameters(model)
    anything = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    # A Hugging Face forward takes **kwargs for its options, and ignores whatever else is in it.
    options = _OPTIONS if anything and hasattr(model, "config") else frozenset()
    if parameters and (not anything or options):
        unknown = [name for name in inputs if name not in parameters and name not in options]
        if unknown:
            raise TypeError(
                f"inputs names {', '.join(map(repr, unknown))}, which the forward of {type(model).__name__} "
                f"does not take; it takes {', '.join(parameters)}"
            )
    missing = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and name not in inputs and each.kind is not each.POSITIONAL_ONLY
    ]
    if missing:
        raise TypeError(
            f"inputs lack {', '.join(map(repr, missing))}, which {type(model).__name__}.forward needs"
        )
    device = device_of(model)
    for name, value in inputs.items():
        _check_value(name, value, device)
    # A tensor made under inference_mode can take no part in a backward pass.
    return {
        name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
        for name, value in inputs.items()
    }


def _check_value(name: str, value: Any, device: Any) -> None:
    if isinstance(value, Tensor):
        if name.endswith(_INDICES) and (value.is_floating_point() or value.is_complex()):
            raise TypeError(f"inputs[{name!r}] holds {value.dtype}; indices are whole numbers (torch.long)")
        if value.device != device and value.dim():
            raise ValueError(f"inputs[{name!r}] is on {value.device}, and the model on {device}")
        return
    array = type(value).__module__.partition(".")[0] == "numpy"
    listed = isinstance(value, (list, tuple)) and value and not isinstance(value[0], Tensor)
    if array or listed or (name.endswith((*_INDICES, "_mask")) and value is not None):
        raise TypeError(f"inputs[{name!r}] is a {type(value).__name__}; a tensor is accepted")
