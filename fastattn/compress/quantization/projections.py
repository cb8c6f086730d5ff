"""The input projections of `nn.MultiheadAttention` as layers of its own, which can then be replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastattn.layers import MultiheadAttention

__all__ = ["fold_projections", "has_folded_projections", "unfold_projections"]

_SEPARATE = ("q_proj", "k_proj", "v_proj")


def has_folded_projections(attention: nn.Module) -> bool:
    """Whether its projections are parameters of its own, as torch.nn has them."""
    return "in_proj" not in attention._modules and "q_proj" not in attention._modules


def unfold_projections(attention: nn.MultiheadAttention) -> None:
    """Turn `in_proj_weight` into the layer `in_proj`, or the three weights into `q_proj`, `k_proj` and
    `v_proj`, of the same parameters, and the attention into fastattn's class, which calls them.

    The joint bias of three weights becomes three.
    """
    joint: Any = attention.in_proj_bias
    if attention.in_proj_weight is not None:
        attention.in_proj = _linear(attention.in_proj_weight, joint)
        attention.in_proj_weight = None  # type: ignore[assignment]
    else:
        biases = (None, None, None) if joint is None else joint.detach().clone().chunk(3)
        for name, bias in zip(_SEPARATE, biases, strict=True):
            bias = None if bias is None else nn.Parameter(bias, requires_grad=joint.requires_grad)
            setattr(attention, name, _linear(getattr(attention, f"{name}_weight"), bias))
            setattr(attention, f"{name}_weight", None)
    attention.in_proj_bias = None  # type: ignore[assignment]
    attention.__class__ = MultiheadAttention


def fold_projections(attention: Any, bias: nn.Parameter | None) -> None:
    """What `unfold_projections` did, undone; the layers must be `nn.Linear` again. `bias` is the joint bias
    there was, which takes the numbers of the three it became.
    """
    if "in_proj" in attention._modules:
        attention.in_proj_weight = attention.in_proj.weight
        del attention.in_proj
    else:
        if bias is not None:
            with torch.no_grad():
                bias.copy_(torch.cat([getattr(attention, name).bias for name in _SEPARATE]))
        for name in _SEPARATE:
            setattr(attention, f"{name}_weight", getattr(attention, name).weight)
            delattr(attention, name)
    attention.in_proj_bias = bias


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = weight
    layer.bias = bias  # type: ignore[assignment]
    return layer
