"""This process as the system sees it: whether it is idle, the memory it holds and the most it held.

Standard library alone: remote_child.py loads this file by its path, in environments that have no fastattn.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "code_bytes",
    "data_bytes",
    "frozen_heap",
    "offer_to_out_of_memory_killer",
    "out_of_memory_kills",
    "peak_bytes",
    "reset_peak",
    "resident_bytes",
    "return_free_memory",
    "wait_until_idle",
]

# Worker threads spin after a call, on cores the next contender needs: ONNX Runtime's for 18 to 40 ms of
# processor time, OpenMP's for 5 to 8 (measured on two cores).
_SETTLE_STEP_S, _SETTLE_LIMIT_S, _IDLE_SHARE = 0.005, 0.25, 0.1
_PROC = Path("/proc/self")
_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(?P<path>.*)$")


def wait_until_idle() -> None:
    """Return when this process's threads have stopped working, or after a quarter of a second."""
    for _ in range(round(_SETTLE_LIMIT_S / _SETTLE_STEP_S)):
        before = time.process_time()
        time.sleep(_SETTLE_STEP_S)
        if time.process_time() - before < _IDLE_SHARE * _SETTLE_STEP_S:
            return


def resident_bytes() -> int | None:
    """Physical memory this process holds now; None where the system does not tell."""
    return _status("VmRSS")


def peak_bytes() -> int | None:
    """The most physical memory this process held since `reset_peak`; None where the system does not tell."""
    return _status("VmHWM")


def data_bytes() -> int | None:
    """Private writable memory, touched or not: what RLIMIT_DATA bounds; None where it is not told."""
    return _status("VmData")


def reset_peak() -> bool:
    """Forget the peak so far (proc(5): 5 written to clear_refs); False where the system does not allow it."""
    try:
        (_PROC / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def code_bytes() -> int:
    """Resident memory of shared libraries and programs: paid once, by whoever calls them first."""
    total, counted = 0, False
    with suppress(OSError), (_PROC / "smaps").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if mapping := _MAPPING.match(line):
                path = mapping["path"]
                counted = ".so" in path.rpartition("/")[2] or "/bin/" in path
            elif counted and line.startswith("Rss:"):
                total += int(line.split()[1]) * 1024
    return total


def return_free_memory() -> None:
    """Give what was freed back to the system: memory kept for reuse would hide what the next one takes."""
    gc.collect()
    with suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Within it `return_free_memory` looks for garbage among what is made there, and no longer among all that
    the process has loaded: a fifth of a second each time where that is torch and transformers.
    """
    if gc.get_freeze_count():  # frozen already, by whoever will thaw it
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def offer_to_out_of_memory_killer() -> None:
    """If the machine runs out of memory, this process goes first, and not the one that measures."""
    with suppress(OSError):
        (_PROC / "oom_score_adj").write_text("1000", encoding="ascii")


def out_of_memory_kills() -> int:
    """How many processes the system has ended for want of memory so far; 0 where it does not tell."""
    with suppress(OSError), Path("/proc/vmstat").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _status(name: str) -> int | None:
    # os.read, not a text file: reading must not itself take memory that is counted.
    try:
        handle = os.open(_PROC / "status", os.O_RDONLY)
    except OSError:
        return None
    try:
        text = os.read(handle, 1 << 16).decode("ascii", "replace")
    finally:
        os.close(handle)
    found = re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
