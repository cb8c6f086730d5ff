"""Where a measurement ran: processor, memory, versions, commit. No host name, user name or path."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastattn

__all__ = ["capture_environment", "cpu_flags", "environment_text"]

_PACKAGES = ("torch", "triton", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy")
# The instructions that decide which of PyTorch's and ONNX Runtime's kernels run, x86 and Arm.
_FLAGS = (
    "avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "amx_tile", "asimd", "bf16", "i8mm", "sve",
)  # fmt: skip


def capture_environment() -> dict[str, Any]:
    """Everything about this machine that a time depends on, as plain values, None where unknown.

    Returns:
        "date_utc", "os", "python", "cpu" (model, cores, flags, torch_threads, load_average), "memory_gib",
        "packages" (name to version), "git" (commit, dirty; None outside a checkout of fastattn) and "gpu"
        (name, driver, memory_gib; None without one).

    Example:
        >>> sorted(capture_environment())
        ['cpu', 'date_utc', 'git', 'gpu', 'memory_gib', 'os', 'packages', 'python']
    """
    import torch

    return {
        "date_utc": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "os": _operating_system(),
        "python": platform.python_version(),
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": _usable_cores(),
            "flags": [flag for flag in _FLAGS if flag in cpu_flags()],
            "torch_threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        },
        "memory_gib": _memory_gib(),
        "packages": {"fastattn": fastattn.__version__, **{name: _version(name) for name in _PACKAGES}},
        "git": _git(),
        "gpu": _gpu(),
    }


def environment_text(environment: dict[str, Any]) -> str:
    """The environment as aligned lines for a terminal."""
    rows: list[tuple[str, str]] = []
    for name, value in environment.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        for entry, each in entries:
            text = (
                ", ".join(map(str, each)) if isinstance(each, list) else "none" if each is None else str(each)
            )
            rows.append((f"{name} {entry}".replace("_", " ").strip(), text))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)


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
        return _output("sysctl", "-n", "machdep.cpu.brand_string")
    return platform.processor() or platform.machine() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        pass
    try:
        import psutil
    except ImportError:
        return None
    return round(int(psutil.virtual_memory().total) / 2**30, 1)


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except (OSError, AttributeError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()}, {platform.machine()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _git() -> dict[str, Any] | None:
    """The commit of the checkout fastattn itself is in: an installed copy may lie inside somebody else's."""
    root = Path(fastattn.__file__).resolve().parent.parent
    top = _output("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    status = _output("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": None if status is None else bool(status)} if commit else None


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "runtime": torch.version.cuda or torch.version.hip,
    }
