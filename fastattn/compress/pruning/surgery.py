"""Taking places out of tensors: the one step that heads, neurons and saved shapes share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fastattn.compress.pruning.structure import Part

__all__ = ["check_cuttable", "shrink"]


def shrink(kept: Iterable[tuple[Part, Sequence[int]]]) -> None:
    """Leave of every part the places of the units that are kept, in their old order.

    Parts that share a tensor (a joint projection of queries, keys and values; a table that all layers read)
    must all be there: what none of them keeps goes. A tensor that loses something becomes a new parameter,
    without a gradient.
    """
    masks: dict[tuple[int, str], tuple[nn.Module, int, Tensor]] = {}
    for part, units in kept:
        places = part.places[torch.as_tensor(list(units), dtype=torch.long, device="cpu")].flatten()
        for name, dim in part.tensors.items():
            size = getattr(part.owner, name).shape[dim]
            _, _, mask = masks.setdefault(
                (id(part.owner), name), (part.owner, dim, torch.zeros(size, dtype=torch.bool, device="cpu"))
            )
            mask[places] = True
    for (_, name), (owner, dim, mask) in masks.items():
        if not bool(mask.all()):
            _select(owner, name, dim, mask.nonzero().flatten())


def check_cuttable(model: nn.Module, parts: Iterable[Part]) -> None:
    """Raise a ValueError where a tensor of `parts` is no parameter of one module alone."""
    holders: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append(f"{module_name}.{name}")
    for part in parts:
        for name in part.tensors:
            tensor = part.owner._parameters.get(name)
            if type(tensor) is not nn.Parameter:
                raise ValueError(
                    f"{part.name!r} is a {type(part.owner).__name__} whose {name} is no plain parameter: "
                    "prune a model before it is quantized, and after adapters and parametrizations are merged"
                )
            if len(holders[id(tensor)]) > 1:
                raise ValueError(
                    f"{' and '.join(holders[id(tensor)])} are one parameter: untie them, or exclude them"
                )


def _select(owner: nn.Module, name: str, dim: int, kept: Tensor) -> None:
    old = getattr(owner, name)
    with torch.no_grad():
        new = old.detach().index_select(dim, kept.to(old.device)).contiguous()
    setattr(owner, name, nn.Parameter(new, requires_grad=old.requires_grad))
    _count(owner)


def _count(owner: nn.Module) -> None:
    """Let a layer's own numbers say what its weight is now."""
    weight = getattr(owner, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return
    rows, columns = weight.shape
    numbers = {
        "out_features": rows,
        "in_features": columns,
        "num_embeddings": rows,
        "embedding_dim": columns,
        # transformers' Conv1D.
        "nx": rows,
        "nf": columns,
    }
    for name, number in numbers.items():
        if name in owner.__dict__:
            setattr(owner, name, number)
