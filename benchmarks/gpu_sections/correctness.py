"""tests/gpu in several processes at once, because most of its time goes into compiling kernels."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

from gpu_sections.processes import STOPPED, Limited
from gpu_sections.record import Record

ROOT = Path(__file__).parents[2]


def run(record: Record, device: torch.device) -> None:
    """The section: every shard must pass."""
    import gpu_checks

    shards = max(1, min(8, (os.cpu_count() or 2) // 2))
    record.set(seed=gpu_checks.SEED, shards=shards)
    logs = [record.path.with_name(f"correctness-{number}.log") for number in range(1, shards + 1)]
    running = []
    for number, log in enumerate(logs, 1):
        environment = os.environ | {
            "FASTATTN_GPU_SHARD": f"{number}/{shards}",
            "FASTATTN_GPU_SEED": str(gpu_checks.SEED),
            # So that eight processes do not run eight times as many threads as there are cores.
            "OMP_NUM_THREADS": "2",
        }
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "--tb=short"]
        running.append(Limited(command, ROOT, environment, log.open("w")))
    for process, log in zip(running, logs, strict=True):
        status = process.wait(record.seconds_left)
        text = log.read_text()
        counts = {
            name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", text)
        }
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.MULTILINE)
        record.add({"log": log.name, "status": status, **counts, "failed_tests": failed})
        if status:
            why = ", ".join(failed[:5]) or ("stopped at the time limit" if status == STOPPED else "no test")
            record.fail(f"{log.name}: exit status {status}: {why}")
