"""Who else used the machine while something was measured: other processes, other guests of the host."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from fastattn.bench.environment import load_average

__all__ = ["LoadMeter"]

_PROC = Path("/proc")


class _Ticks(NamedTuple):
    """Processor time of the whole machine since it started, in the system's ticks."""

    total: int
    idle: int
    stolen: int


class LoadMeter:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._before = load_average()
        self._ticks, self._own_s = _ticks(), _own_seconds()

    def read(self) -> dict[str, float | None]:
        """What was found, None where the system does not tell (other than Linux).

        Returns:
            "load_average_before" and "load_average_after"; of the processor time there was since, the parts
            "others_share" that other processes took and "stolen_share" that the hypervisor gave to other
            machines; "cpu_mhz", the cores' mean frequency now.
        """
        found: dict[str, float | None] = {
            "load_average_before": self._before,
            "load_average_after": load_average(),
            "others_share": None,
            "stolen_share": None,
            "cpu_mhz": _mean_mhz(),
        }
        now = _ticks()
        if self._ticks is None or now is None or now.total <= self._ticks.total:
            return found
        total, idle, stolen = (after - before for after, before in zip(now, self._ticks, strict=True))
        own = (_own_seconds() - self._own_s) * os.sysconf("SC_CLK_TCK")
        others = max(0.0, total - idle - stolen - own)
        return found | {
            "others_share": round(min(1.0, others / total), 3),
            "stolen_share": round(stolen / total, 3),
        }


def _ticks() -> _Ticks | None:
    """The first line of /proc/stat (proc(5)): user, nice, system, idle, iowait, irq, softirq, steal."""
    with suppress(OSError, ValueError), (_PROC / "stat").open(encoding="ascii") as lines:
        times = [int(each) for each in lines.readline().split()[1:9]]
        if len(times) == 8:
            return _Ticks(sum(times), times[3] + times[4], times[7])
    return None


def _own_seconds() -> float:
    """Processor seconds of this process and the children it has waited for."""
    return sum(os.times()[:4])


def _mean_mhz() -> float | None:
    with suppress(OSError):
        text = (_PROC / "cpuinfo").read_text(encoding="utf-8", errors="replace")
        if found := re.findall(r"^cpu MHz\s*: ([\d.]+)$", text, re.MULTILINE):
            return round(sum(map(float, found)) / len(found), 0)
    return None
