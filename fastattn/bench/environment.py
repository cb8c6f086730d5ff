"""Where a measurement ran: processor, memory, versions, commit. No host name, user name or path."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastattn
from fastattn.processor import output_of, processor

__all__ = ["capture_environment", "environment_text", "load_average"]

_PACKAGES = (
    "torch", "triton", "transformers", "onnx", "onnxruntime", "onnxscript", "numpy",
    "openvino", "ctranslate2", "liger-kernel",
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
            **processor(),
            "torch_threads": torch.get_num_threads(),
            "load_average": load_average(),
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


def load_average() -> float | None:
    """The load of the last minute, None where the system keeps none."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


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


def _git() -> dict[str, Any] | None:
    """The commit of the checkout fastattn itself is in: an installed copy may lie inside somebody else's."""
    root = Path(fastattn.__file__).resolve().parent.parent
    top = output_of("git", "-C", str(root), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    commit = output_of("git", "-C", str(root), "rev-parse", "HEAD")
    status = output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)} if commit else None


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver.splitlines()[0] if driver else None,
        "runtime": torch.version.cuda or torch.version.hip,
    }
