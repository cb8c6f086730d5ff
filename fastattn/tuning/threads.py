"""How many threads PyTorch is fastest with, for small batches and for large ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastattn.bench.timing import Contender
from fastattn.processor import processor
from fastattn.tuning.fills import encoder
from fastattn.tuning.trials import Trials, fastest

__all__ = ["BATCHES", "candidates", "measure_threads"]

# Sequences and length of a batch.
BATCHES = {"small": (1, 16), "large": (8, 128)}


def measure_threads(trials: Trials, budget_s: float) -> dict[str, int]:
    """Of each of BATCHES the number of threads for torch.set_num_threads: torch's own unless another is
    surely faster. Empty where there is no choice. The number is torch's own again afterwards.
    """
    own = torch.get_num_threads()
    counts = [own, *(count for count in candidates() if count != own)]
    if trials.device != "cpu" or len(counts) == 1:
        return {}
    model = encoder("cpu", torch.float32)
    found = {}
    try:
        for size, (batch, length) in BATCHES.items():
            x = torch.randn(batch, length, model.layers[0].linear1.in_features)
            contenders = [Contender(_name(count), _with_threads(count, lambda: model(x))) for count in counts]  # noqa: B023
            case = f"{size} batches, {batch} x {length}"
            rows = trials.ask(
                "threads", case, contenders, lambda rows: fastest(rows).name, budget_s / len(BATCHES)
            )
            found[size] = counts[rows.index(fastest(rows))]
    finally:
        torch.set_num_threads(own)
    return found


def candidates() -> list[int]:
    """Numbers of threads worth trying: the cores this process may use, the physical ones among them, and half
    of them.
    """
    usable = processor()["usable_cores"] or 1
    return sorted({usable, min(usable, _physical_cores() or usable), max(1, usable // 2)}, reverse=True)


def _physical_cores() -> int | None:
    try:
        import psutil
    except ImportError:
        return None
    count: int | None = psutil.cpu_count(logical=False)
    return count


def _with_threads(count: int, run: Callable[[], Any]) -> Callable[[], Any]:
    def counted() -> Any:
        torch.set_num_threads(count)
        return run()

    return counted


def _name(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"
