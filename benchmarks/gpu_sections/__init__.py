"""The sections of benchmarks/gpu.py: what each runs, and for how long at most."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

# Seconds a section may take, in the order they run; under nine minutes with gpu.py's grace. A section's
# module has `run(record, device)`, which gives what it found to `record` as it goes.
BUDGETS_S = {
    "smoke": 60,
    "correctness": 120,
    "sanitizer": 80,
    "attention": 90,
    "varlen": 35,
    "decode": 40,
    "norm": 45,
    "pointwise": 30,
}


def load(section: str) -> ModuleType:
    """The section's module."""
    return import_module(f"gpu_sections.{section}")
