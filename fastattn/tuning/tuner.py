"""`tune`: every question put to the machine in turn, within a budget."""

from __future__ import annotations

from datetime import UTC, datetime

import torch
from tqdm import tqdm

from fastattn.bench.environment import load_average
from fastattn.bench.timing import measure as bench_measure
from fastattn.tuning.backends import OPERATIONS, measure_backends
from fastattn.tuning.fills import SHAPES, measure_fills
from fastattn.tuning.machine import this_machine
from fastattn.tuning.multiples import measure_multiple
from fastattn.tuning.outcome import Tuning
from fastattn.tuning.precisions import measure_precision
from fastattn.tuning.threads import BATCHES, measure_threads
from fastattn.tuning.trials import Measure, Trials

__all__ = ["DEVICES", "resolved", "tune"]

DEVICES = ("auto", "cpu", "cuda")


def tune(
    device: str = "auto",
    budget_s: float = 60.0,
    *,
    measure: Measure = bench_measure,
    progress: bool = False,
) -> Tuning:
    """Measure what is fastest here; nothing is written (`save` does) and no setting of torch's is changed.

    Args:
        device: "cpu", "cuda", or "auto": cuda where there is one.
        budget_s: seconds of timing altogether; making and warming up what is timed comes on top.
        measure: takes the place of `fastattn.bench.measure`.
        progress: show a bar on stderr (where that is a terminal).

    Raises:
        ValueError: `device` is none of these or not on this machine; `budget_s` is not above 0.
    """
    where = resolved(device)
    if not budget_s > 0:
        raise ValueError(f"budget_s is {budget_s!r}; it must be a number of seconds above 0")
    load = load_average()
    on_gpu = where == "cuda"
    # What is asked at least: a shape that runs padded at its first fill is asked again.
    count = len(SHAPES) + (len(OPERATIONS) if on_gpu else 1 + len(BATCHES)) + 2
    with tqdm(total=count, desc="tuning", disable=None if progress else True, leave=False, unit="") as bar:
        trials = Trials(measure, where, bar)
        precision, ratio, error = measure_precision(trials, 0.2 * budget_s)
        fills = measure_fills(trials, 0.4 * budget_s)
        backends = measure_backends(trials, (0.3 if on_gpu else 0.02) * budget_s)
        threads = measure_threads(trials, 0.2 * budget_s)
        multiple = measure_multiple(trials, 0.1 * budget_s)
    return Tuning(
        this_machine(where),
        datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        fills,
        backends,
        precision,
        ratio,
        error,
        threads,
        torch.get_num_threads(),
        load,
        multiple,
        tuple(trials.comparisons),
    )


def resolved(device: str) -> str:
    """The device "auto" stands for, any other as it is.

    Raises:
        ValueError: it is none of DEVICES, or not on this machine.
    """
    if device not in DEVICES:
        raise ValueError(f"device is {device!r}; it must be one of {', '.join(DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device is "cuda", and no CUDA or ROCm device is visible to torch; use "cpu"')
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
