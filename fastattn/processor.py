"""The processor of this machine: what it is called, which instructions it has, which cores are ours."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

__all__ = ["cpu_flags", "output_of", "processor"]

# The instructions that decide which of PyTorch's and ONNX Runtime's kernels run, x86 and Arm.
_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "amx_tile", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip


def processor() -> dict[str, Any]:
    """The processor: "model" and "flags" (the instruction sets that times depend on) as the system names
    them, "cores", and "usable_cores", those this process may run on.
    """
    return {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "flags": [flag for flag in _FLAGS if flag in cpu_flags()],
    }


def cpu_flags() -> frozenset[str]:
    """The processor's instruction-set flags as Linux names them; empty where they cannot be read."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _usable_cores() -> int | None:
    """Cores this process may run on: fewer than the machine has where it is confined to some of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_model() -> str | None:
    fields: dict[str, str] = {}
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    if "model name" in fields:
        # Hypervisors hide the product name; family and model still tell the generation.
        numbers = [
            f"{label} {fields[key]}"
            for label, key in (("family", "cpu family"), ("model", "model"))
            if key in fields
        ]
        return fields["model name"] + (f" ({', '.join(numbers)})" if numbers else "")
    if platform.system() == "Darwin":
        return output_of("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine() or None


def output_of(*command: str) -> str | None:
    """What a command prints; None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
