"""Any contender in a process of its own: one that crashes takes nobody with it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from fastattn.bench.contenders.remote_runner import RemoteRunner
from fastattn.bench.contenders.runner import Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.remote import CHILD, RemoteProcess

__all__ = ["build"]

_WORKER = Path(__file__).with_name("isolated_worker.py")


def build(source: Source, key: str, precision: str, stages: Stages) -> Runner:
    """The contender `key` of BUILDERS, built in a process that runs the same Python and packages as this one.

    Raises:
        MissingError: as its builder does.
        RemoteError: it could not be built, or the process died.
    """
    pickled = source.folder / "models.pt"
    if not pickled.exists():
        torch.save(source.models, pickled)
    command: list[str | Path] = [
        sys.executable, CHILD, _WORKER, pickled, key, precision, source.device.type, source.kind,
        str(torch.get_num_threads()),
    ]  # fmt: skip
    child = source.resources.enter_context(RemoteProcess(command, source.folder, environment=os.environ))
    stages.times_ms.update(child.stages_ms)
    return RemoteRunner(child)
