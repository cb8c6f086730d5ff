"""Measure launch choices on this GPU and write the fastest where _tuned.py finds them.

    python -m fastattn_kernels.tune                       # every operation, into the package's tuned/
    python -m fastattn_kernels.tune --op decode_attention --output folder/GPU.json --budget-s 120

A file elsewhere is read where FASTATTN_TUNED names its folder and it keeps the GPU's name.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import triton

from ._launch import architecture_of
from ._tuned import TUNED_FOLDER, Trial, gpu_of, read_tuned, trying
from .tune_workloads import WORKLOADS, Workload

__all__ = ["Finding", "tune_workload", "write_findings"]

# Less than this is noise: the heuristic's choice stays.
WORTHWHILE = 1.02
_names = (f"trial-{number}" for number in count())
Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Finding:
    """What was measured of one workload.

    Attributes:
        op: the operation as `tuned_choice` is asked for it.
        workload: its name.
        key: what the launch choice depends on.
        choice: the fastest configuration; None where none beats the heuristic's by 2%.
        heuristic_ms, fastest_ms: a call with the heuristic's and with the fastest configuration.
        tried: configurations measured.
        refused: configurations that do not launch, or whose result is wrong, with the reason.
    """

    op: str
    workload: str
    key: dict[str, Any]
    choice: dict[str, int] | None
    heuristic_ms: float
    fastest_ms: float
    tried: int
    refused: dict[str, str]


def tune_workload(workload: Workload, device: torch.device, timer: Timer, until: float = math.inf) -> Finding:
    """Measure every candidate of one workload against the heuristic's choice.

    Args:
        workload: what is run.
        device: where; the interpreter takes the CPU.
        timer: milliseconds of a call.
        until: when to stop, on time.monotonic's clock; candidates not reached are not measured.

    Raises:
        RuntimeError: the operation asks for no tuned choice, or for several.
    """
    run = workload.prepare(device)
    with trying(Trial(workload.op, None, next(_names))) as trial:
        expected = run()
        heuristic_ms = timer(run)
    keys = [dict(pairs) for pairs in {tuple(key.items()) for key in trial.keys}]
    if len(keys) != 1:
        raise RuntimeError(f"{workload.name} asked for {len(keys)} choices of {workload.op!r}; it must be 1")
    fastest, choice, tried, refused = heuristic_ms, None, 0, {}
    for candidate in workload.candidates(architecture_of(device)):
        if time.monotonic() > until:
            break
        tried += 1
        numbers = {name: int(number) for name, number in asdict(candidate).items()}
        try:
            with trying(Trial(workload.op, numbers, next(_names))):
                check_same(expected, run())
                milliseconds = timer(run)
        except Exception as error:
            # What exceeds the GPU's shared memory or registers raises at the launch.
            refused[str(numbers)] = f"{type(error).__name__}: {error}"[:200]
            continue
        if milliseconds < fastest:
            fastest, choice = milliseconds, numbers
    if heuristic_ms < WORTHWHILE * fastest:
        choice = None
    return Finding(workload.op, workload.name, keys[0], choice, heuristic_ms, fastest, tried, refused)


def check_same(expected: Any, found: Any) -> None:
    """Outputs of two configurations: equal but for rounding.

    Raises:
        ValueError: they are not.
    """
    pairs = zip(_tensors(expected), _tensors(found), strict=True)
    for one, other in pairs:
        finite = one.isfinite()
        scale = one[finite].abs().max().item() if finite.any() else 0.0
        error = (one.double() - other.double())[finite].abs().max().item() if finite.any() else 0.0
        # Not `error > ...`: a NaN compares false.
        if not error <= 8 * torch.finfo(one.dtype).eps * scale or not torch.equal(finite, other.isfinite()):
            raise ValueError(f"its result is off by {error:.3g} of {scale:.3g}")


def _tensors(output: Any) -> Sequence[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)


def write_findings(findings: Iterable[Finding], gpu: str, path: Path) -> None:
    """Put what beats the heuristics into the file at `path`; entries of other keys stay.

    Raises:
        ValueError: there is a malformed file at `path`.
    """
    ops: dict[str, list[dict[str, Any]]] = {}
    if path.exists():
        read_tuned(path)
        ops = json.loads(path.read_text(encoding="utf-8"))["ops"]
    for finding in findings:
        key = {name: _plain(value) for name, value in finding.key.items()}
        entries = [entry for entry in ops.get(finding.op, []) if entry["key"] != key]
        if finding.choice is not None:
            times = {"ms": round(finding.fastest_ms, 5), "heuristic_ms": round(finding.heuristic_ms, 5)}
            entries.append({"key": key, "choice": finding.choice, **times})
        ops[finding.op] = entries
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    content = {"gpu": gpu, "date": date, "torch": torch.__version__, "triton": triton.__version__, "ops": ops}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (bool, int, str)) else str(value).removeprefix("torch.")


def device_ms(run: Callable[[], Any]) -> float:
    """The median of a call on the GPU, caches flushed between calls."""
    return float(triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median"))


def _writable(folder: Path) -> bool:
    """Whether `folder` can be made, or written into."""
    while not folder.exists():
        folder = folder.parent
    return os.access(folder, os.W_OK)


def main(argv: list[str] | None = None) -> int:
    """`python -m fastattn_kernels.tune`: measure, print a line a workload, and write the file as it goes."""
    parser = argparse.ArgumentParser(prog="python -m fastattn_kernels.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    ops = sorted({workload.op for workload in WORKLOADS})
    parser.add_argument("--op", nargs="+", choices=ops, default=ops)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: tuned/GPU.json of the package")
    parser.add_argument("--budget-s", type=float, default=480.0, help="seconds in all (%(default)s)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tune: torch sees no CUDA or ROCm device; choices are measured on a GPU only", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    gpu = gpu_of(device)
    assert gpu is not None
    path = arguments.output or TUNED_FOLDER / f"{gpu}.json"
    if path.exists():
        try:
            read_tuned(path)
        except ValueError as error:
            print(f"tune: {error}", file=sys.stderr)
            return 2
    elif not _writable(path.parent):
        print(f"tune: {path.parent} cannot be written; name a file with --output", file=sys.stderr)
        return 2
    end = time.monotonic() + arguments.budget_s
    chosen = [workload for workload in WORKLOADS if workload.op in arguments.op]
    failed = 0
    for number, workload in enumerate(chosen):
        # What is left is shared by the workloads left.
        share = (end - time.monotonic()) / (len(chosen) - number)
        if share <= 0:
            print(f"{workload.name}: left out, the time is up")
            continue
        own_end = time.monotonic() + share
        try:
            finding = tune_workload(workload, device, device_ms, until=own_end)
        except Exception as error:
            print(f"{workload.name}: {type(error).__name__}: {error}")
            failed = 1
            continue
        write_findings([finding], gpu, path)
        gain = finding.heuristic_ms / finding.fastest_ms
        what = f"{finding.choice}, {gain:.2f}x" if finding.choice else "the heuristic's choice stays"
        print(f"{workload.name}: {finding.tried} tried, {len(finding.refused)} refused; {what}", flush=True)
    print(f"written: {path}")
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
