"""compute-sanitizer over a reduced grid (sanitized.py): accesses outside tensors, races in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from gpu_sections.processes import STOPPED, Limited
from gpu_sections.record import Record

ROOT = Path(__file__).parents[2]
TOOLS = {"memcheck": 0.55, "racecheck": 1.0}


def find_sanitizer() -> Path | None:
    """compute-sanitizer on PATH, in CUDA_HOME, in /usr/local/cuda, or in an installed nvidia package."""
    on_path = shutil.which("compute-sanitizer")
    if on_path:
        return Path(on_path)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) for home in homes if home]
    for package in ("nvidia", "triton"):
        spec = find_spec(package)
        folders += [Path(each) for each in (spec.submodule_search_locations or [])] if spec else []
    for folder in folders:
        for found in (
            *folder.glob("**/bin/compute-sanitizer"),
            *folder.glob("compute-sanitizer/compute-sanitizer"),
        ):
            if found.is_file() and os.access(found, os.X_OK):
                return found
    return None


def run(record: Record, device: torch.device) -> None:
    """The section; says so where there is no compute-sanitizer."""
    tool = find_sanitizer()
    if tool is None:
        record.set(missing="compute-sanitizer is not on PATH, in CUDA_HOME or in an nvidia package")
        record.fail("compute-sanitizer is missing: install the CUDA toolkit or put it on PATH")
        return
    environment = os.environ | {
        # Each tensor an allocation of its own: the caching allocator would hide accesses past its end.
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    driver = [sys.executable, str(Path(__file__).with_name("sanitized.py"))]
    for name, share in TOOLS.items():
        log = record.path.with_name(f"sanitizer-{name}.log")
        command = [str(tool), "--tool", name, "--error-exitcode", "9", *driver]
        limit = record.seconds_left * share
        with log.open("w") as output:
            status = Limited(command, ROOT, environment, output).wait(limit)
        text = log.read_text()
        summary = re.findall(r"(ERROR SUMMARY: .*|RACECHECK SUMMARY: .*)", text)
        calls = len(re.findall(r"^done: ", text, re.MULTILINE))
        entry = {"tool": name, "status": status, "summary": summary[-1:], "log": log.name}
        record.add(entry | {"calls": calls})
        if status:
            why = "stopped at the time limit" if status == STOPPED else (summary[-1:] or ["see the log"])[0]
            record.fail(f"{name}: exit status {status}: {why}")
