"""What a workload does with a model: its inputs, what is timed, and what the answer is compared by."""

from __future__ import annotations

import torch

from fastattn.bench.contenders.source import Kind
from fastattn.bench.tasks.decode import DecodeWork
from fastattn.bench.tasks.forward import ForwardWork
from fastattn.bench.tasks.train import TrainWork
from fastattn.bench.tasks.work import Work
from fastattn.bench.workloads import Task, Workload

__all__ = ["Work", "work_for"]

_WORKS: dict[Task, type[Work]] = {
    "encode": ForwardWork,
    "classify": ForwardWork,
    "prefill": ForwardWork,
    "decode": DecodeWork,
    "train": TrainWork,
}


def work_for(workload: Workload, model: torch.nn.Module, kind: Kind, device: torch.device) -> Work:
    """One workload on one model, for every contender.

    Args:
        model: the user's own, of which only the config and the signature are read.
        kind: what it is.
        device: where the inputs are put.

    Raises:
        ValueError: the workload's tokens are not the model's.
    """
    return _WORKS[workload.task](workload, model, kind, device)
