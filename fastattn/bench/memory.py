"""Memory: what a contender adds at its peak, and a limit under which too large a shape raises."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fastattn.bench import process

__all__ = ["Memory", "MemoryMeter", "available_bytes", "is_out_of_memory", "memory_limit"]

# Left to the system and to what grows meanwhile: the limit counts what is reserved, not what is touched.
_MARGIN_BYTES, _MARGIN_SHARE = 256 * 2**20, 0.03
_OWN_GROUPS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
# How PyTorch's allocators, ONNX Runtime's, oneDNN, CUDA's libraries and C++ say it, in lower case.
_OUT_OF_MEMORY = (
    "can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc",
    "failed to allocate memory", "unable to allocate", "could not allocate", "alloc_failed",
)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes on the host and on the GPU; None where they cannot be told."""

    host_bytes: int | None
    device_bytes: int | None

    def __add__(self, other: Memory) -> Memory:
        def total(mine: int | None, its: int | None) -> int | None:
            return None if mine is None or its is None else mine + its

        return Memory(total(self.host_bytes, other.host_bytes), total(self.device_bytes, other.device_bytes))


class MemoryMeter:
    """What is taken from here on: what building a contender leaves, and the peak of one call.

    Host memory is resident memory of the whole process, by the high-water mark that Linux keeps (VmHWM): of
    all threads, and of no child. The pages of shared libraries are left out: whoever calls one first would
    pay for everybody. Caches that contenders share (oneDNN's kernels, stacks of a thread pool) are still the
    first one's. Device memory is what PyTorch's allocator handed out: not what ONNX Runtime takes, nor the
    pool of a CUDA graph. None where the system does not tell: on macOS, on Windows, and where a sandbox
    refuses.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self._on_cuda = device.startswith("cuda")
        self._knows_peak = False
        self.restart()

    def restart(self) -> None:
        """What is held now does not count."""
        process.return_free_memory()
        self._before = self._held()

    def added(self) -> Memory:
        """What is held now beyond what was held when the meter was made."""
        process.return_free_memory()
        return self._beyond(self._held())

    def begin_call(self) -> None:
        """Forget peaks so far: what building took is not counted, what it left is."""
        self._knows_peak = process.reset_peak()
        if self._on_cuda:
            import torch

            torch.cuda.reset_peak_memory_stats()

    def end_call(self) -> Memory:
        """The peak since `begin_call`, less what was held when the meter was made."""
        highest = process.peak_bytes() if self._knows_peak else None
        host = None if highest is None else highest - process.code_bytes()
        device = None
        if self._on_cuda:
            import torch

            device = int(torch.cuda.max_memory_allocated())
        return self._beyond(Memory(host, device))

    def _held(self) -> Memory:
        resident = process.resident_bytes()
        host = None if resident is None else resident - process.code_bytes()
        if not self._on_cuda:
            return Memory(host, None)
        import torch

        return Memory(host, int(torch.cuda.memory_allocated()))

    def _beyond(self, now: Memory) -> Memory:
        def grown(after: int | None, before: int | None) -> int | None:
            return None if after is None or before is None else max(0, after - before)

        return Memory(
            grown(now.host_bytes, self._before.host_bytes), grown(now.device_bytes, self._before.device_bytes)
        )


@contextmanager
def memory_limit() -> Iterator[None]:
    """Within it, host memory beyond what is free cannot be had: allocating raises, and nobody is killed.

    Linux: the soft limit on the process's data (RLIMIT_DATA, which counts private writable memory, touched or
    not) is what it has plus what is free. Elsewhere, and on machines with a GPU, whose driver reserves
    address space as it likes, it does nothing. Programs started within it inherit the limit.
    """
    torch = sys.modules.get("torch")
    if not sys.platform.startswith("linux") or (torch is not None and torch.cuda.is_available()):
        yield
        return
    import resource

    available, held = available_bytes(), process.data_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if available is None or held is None:
        yield
        return
    room = max(0, available - _MARGIN_BYTES - int(_MARGIN_SHARE * available))
    bounds = [held + room, *(each for each in (soft, hard) if each != resource.RLIM_INFINITY)]
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def available_bytes() -> int | None:
    """Memory that can be had without swapping: of the machine, or of the container where that has less."""
    with suppress(OSError), Path("/proc/meminfo").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, *_container_rooms(), sys.maxsize)
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or the GPU, whichever library says so."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = str(error).lower()
    return type(error).__name__ == "OutOfMemoryError" or any(phrase in text for phrase in _OUT_OF_MEMORY)


def _container_rooms() -> list[int]:
    """What each control group of this process has left: limit less use, without the page cache."""
    rooms = []
    with suppress(OSError):
        for line in _OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, controllers, inside = line.split(":", 2)
            if not controllers:
                root, limit, use = _GROUPS, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                root, limit, use = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            group = root / inside.lstrip("/")
            for folder in (group, *group.parents):
                # A file that is not there, or "max": no limit at this level.
                with suppress(OSError, ValueError):
                    room = int((folder / limit).read_text()) - int((folder / use).read_text())
                    rooms.append(max(0, room + _page_cache(folder)))
                if folder == root:
                    break
    return rooms


def _page_cache(group: Path) -> int:
    """Bytes of files kept in memory by a control group."""
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))
