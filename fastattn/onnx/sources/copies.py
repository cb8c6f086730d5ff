"""The two copies an export works on, so that the user's model is never touched."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastattn.swap import is_swapped, optimize, unfuse
from fastattn.verification import shared_copy

__all__ = ["fused_and_reference", "is_custom"]


def fused_and_reference(model: nn.Module, *, must_swap: bool = True) -> tuple[nn.Module, nn.Module]:
    """Swapped and as it was before any swap (quantized, if it is), both in eval mode, on the CPU in float32;
    they share the model's parameters where those are that already.

    Args:
        model: swapped or not; a swapped one is copied as it is (with its `padding`, say).
        must_swap: whether a model of which nothing can be swapped is refused.

    Raises:
        ValueError: parameters on the meta device, or nothing to swap.
    """
    reference, fused = _private_copy(model), _private_copy(model)
    unfuse(reference)
    config: Any = getattr(reference, "config", None)
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        # transformers' SDPA leaves the cap out, and its older versions choose it for Gemma 2 all the same.
        reference.set_attn_implementation("eager")  # type: ignore[operator]
    if not is_swapped(fused):
        report = optimize(fused)
        if must_swap and not report.swapped:
            reason = report.sites[0].reason if report.sites else "no layer of it is known"
            raise ValueError(f"the model cannot be exported: {reason}")
    return fused.eval(), reference.eval()


def is_custom(model: object) -> bool:
    """Whether `model` is a module of the user's own and no Hugging Face model."""
    return isinstance(model, nn.Module) and not hasattr(getattr(model, "config", None), "model_type")


def _private_copy(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model has parameters on the meta device: load its weights before exporting")
    if all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors):
        return shared_copy(model)
    return copy.deepcopy(model).to(device="cpu", dtype=torch.float32)
