"""Prompts: a workload's sequences padded on the left, so that the next token follows each."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from fastattn.bench.contenders.source import token_inputs
from fastattn.bench.contenders.stamps import counted_positions
from fastattn.bench.workloads import Workload

__all__ = ["prompts", "with_positions"]


def prompts(workload: Workload, model: torch.nn.Module, device: torch.device) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, int64 [batch, sequence], padded on the left."""
    batch = token_inputs(model, workload, device)
    mask = batch["attention_mask"]
    # Stable: padding first, then the tokens in their order.
    order = mask.argsort(dim=1, stable=True)
    return {name: batch[name].gather(1, order) for name in ("input_ids", "attention_mask")}


def with_positions(batch: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """The prompts with the `position_ids` [batch, sequence] that `generate` would count, for a model that
    takes them and would count padding.
    """
    mask = batch["attention_mask"]
    if "position_ids" not in inspect.signature(model.forward).parameters or bool((mask != 0).all()):
        return batch
    return {**batch, "position_ids": counted_positions(mask)}
