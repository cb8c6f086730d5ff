"""The clocks: wall and processor time on a CPU, device events on a GPU, and runs that time themselves."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

from fastattn.bench.process import wait_until_idle

__all__ = ["CpuTimer", "CudaTimer", "Sample", "SelfTimed", "Timer"]


class Sample(NamedTuple):
    """Several calls together.

    Attributes:
        wall_s: what ratios are made of.
        cpu_s: processor seconds over all threads of the process that ran them.
        device_s: seconds on the GPU, None elsewhere.
        output: of the last call.
    """

    wall_s: float
    cpu_s: float
    device_s: float | None
    output: Any


@runtime_checkable
class SelfTimed(Protocol):
    """A run that another process makes, and times."""

    peak_host_bytes: int | None

    def sample(self, calls: int) -> Sample:
        """The other process's own times of `calls` calls."""
        ...


class Timer(Protocol):
    """Times calls; the seam for a fake clock."""

    def now(self) -> float:
        """Seconds on the wall clock."""
        ...

    def sample(self, run: Callable[[], Any], calls: int) -> Sample:
        """`calls` calls, one after another."""
        ...


class CpuTimer:
    """perf_counter for wall time, process_time for the processor time of all threads."""

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, run: Callable[[], Any], calls: int) -> Sample:
        """A sample begins when the threads of the contender before have stopped working."""
        wait_until_idle()
        if isinstance(run, SelfTimed):
            return run.sample(calls)
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            output = run()
        return Sample(time.perf_counter() - wall, time.process_time() - cpu, None, output)


class CudaTimer:
    """Device time between two events, wall time from an idle device to an idle device.

    Args:
        flush_l2: for operations too short for a wall clock: each call finds a cold L2 cache, and the device
            is kept busy while the host enqueues it, so that what is timed is the device's work and not the
            launch. `Sample.wall_s`, and with it every ratio, is then the device's time.
    """

    # Five times the largest L2 there is (B200: 126 MB).
    flush_bytes = 640 * 2**20
    # Some 300 us, longer than the host takes to enqueue an operation.
    pause_cycles = 500_000

    def __init__(self, flush_l2: bool = False) -> None:
        import torch

        self._scratch = torch.empty(self.flush_bytes, dtype=torch.int8, device="cuda") if flush_l2 else None

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, run: Callable[[], Any], calls: int) -> Sample:
        """One pair of events around all calls; around each of them where the cache is flushed."""
        import torch

        torch.cuda.synchronize()
        if isinstance(run, SelfTimed):
            return run.sample(calls)
        if self._scratch is None:
            cpu, wall = time.process_time(), time.perf_counter()
            device, _, output = _between_events(run, calls)
            return Sample(time.perf_counter() - wall, time.process_time() - cpu, device, output)
        device, cpu = 0.0, 0.0
        for _ in range(calls):
            self._scratch.zero_()
            torch.cuda._sleep(self.pause_cycles)
            seconds, launch_s, output = _between_events(run, 1)
            device, cpu = device + seconds, cpu + launch_s
        return Sample(device, cpu, device, output)


def _between_events(run: Callable[[], Any], calls: int) -> tuple[float, float, Any]:
    """Device seconds of `calls` calls, the processor's to launch them, and the last output; the device is
    done when it returns.
    """
    import torch

    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    cpu = time.process_time()
    start.record()
    for _ in range(calls):
        output = run()
    end.record()
    cpu = time.process_time() - cpu
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, cpu, output
