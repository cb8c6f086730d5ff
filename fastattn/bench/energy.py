"""Joules a call where the GPU counts them: NVML's total energy counter, read by nvidia-ml-py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["EnergyMeter"]

# The counter moves every 20 to 100 ms, depending on the GPU; over a second that is at most a tenth.
_COUNTED_S = 1.0


class EnergyMeter:
    """The energy of one GPU: of all that runs on it and of what it takes when idle.

    Args:
        joules: reads the counter.
        synchronize: returns when the device is idle.
    """

    def __init__(self, joules: Callable[[], float], synchronize: Callable[[], None]) -> None:
        self._joules = joules
        self._synchronize = synchronize

    @classmethod
    @contextmanager
    def open(cls, device: str) -> Iterator[EnergyMeter | None]:
        """The meter of a device such as "cuda" or "cuda:1"; None on a CPU, without nvidia-ml-py, and on GPUs
        that do not count (before Volta, AMD's, some virtual ones).
        """
        if not device.startswith("cuda"):
            yield None
            return
        try:
            import pynvml
        except ImportError:
            yield None
            return
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError:
            yield None
            return
        try:
            yield cls._of(pynvml, device)
        finally:
            pynvml.nvmlShutdown()

    @classmethod
    def _of(cls, pynvml: Any, device: str) -> EnergyMeter | None:
        import torch

        # By its identity: NVML numbers the machine's GPUs, CUDA those that are visible, in its own order.
        uuid = torch.cuda.get_device_properties(torch.device(device)).uuid
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return None
        return cls(
            lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
            lambda: torch.cuda.synchronize(device),
        )

    def per_call(self, run: Callable[[], Any]) -> float:
        """Joules a call, from as many calls as a second takes."""
        self._synchronize()
        before, begin, calls = self._joules(), time.perf_counter(), 0
        while time.perf_counter() - begin < _COUNTED_S:
            run()
            calls += 1
            # Calls that are only enqueued would go on for long after the second.
            self._synchronize()
        return (self._joules() - before) / calls
