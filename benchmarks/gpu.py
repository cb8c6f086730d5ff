"""Everything that needs a GPU, in one command of under nine minutes.

    python benchmarks/gpu.py                                # all sections
    python benchmarks/gpu.py --section smoke                # one minute: every operation launched and checked
    python benchmarks/gpu.py --section attention decode     # these
    TRITON_INTERPRET=1 python benchmarks/gpu.py --section smoke --device cpu        # without a GPU

Smoke test, correctness suite (tests/gpu) and compute-sanitizer come first, timing after. It needs this
checkout, torch, triton and pytest, nothing installed. Each section is a process of its own with its own time
limit and writes OUTPUT/SECTION.json as it goes; OUTPUT/summary.json has the machine, the versions, the
promises and what failed. The exit status is 1 where something failed or a promise is broken, and 2 without a
GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The checkout will do: nothing needs to be installed. tests/gpu has the formulas results are checked with.
PATHS = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]
sys.path[:0] = PATHS

from gpu_sections import BUDGETS_S, load  # noqa: E402

# What a section may take beyond its budget, for a case under way, before it is stopped.
GRACE_S = 5


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", nargs="+", choices=list(BUDGETS_S), default=list(BUDGETS_S))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu", metavar="FOLDER"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--budget-s",
        type=float,
        help="seconds in all, shared out over the sections chosen as their budgets are",
    )
    parser.add_argument("--one-section", choices=list(BUDGETS_S), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def refusal(arguments: argparse.Namespace) -> str | None:
    """Why this cannot run here; None where it can."""
    if arguments.device == "cpu":
        if arguments.section != ["smoke"]:
            return "--device cpu runs the smoke section only: give --section smoke"
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "--device cpu runs in Triton's interpreter: set TRITON_INTERPRET=1"
        return None
    import torch

    if torch.cuda.is_available():
        return None
    return "torch sees no CUDA or ROCm device: nothing was run. Without one: --section smoke --device cpu"


def run_section(section: str, folder: Path, device: str, budget_s: float) -> int:
    """The section, in this process."""
    if device == "cpu":
        os.environ["FASTATTN_BACKEND"] = "triton"
    import torch
    from gpu_sections.record import Record

    record = Record(section, folder / f"{section}.json", budget_s)
    try:
        load(section).run(record, torch.device(device))
    except Exception as error:
        record.fail(f"{type(error).__name__}: {error}")
        raise
    record.set(complete=True, seconds_left=round(record.seconds_left, 1))
    return 1 if record.content["failures"] else 0


def clocks() -> str | None:
    """Clocks, temperature and power as nvidia-smi gives them now."""
    fields = "clocks.sm,clocks.mem,temperature.gpu,power.draw,clocks_event_reasons.active"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def main(argv: list[str] | None = None) -> int:
    """Run the sections chosen, each in a process of its own."""
    arguments = arguments_of(argv)
    why = refusal(arguments)
    if why is not None:
        print(f"gpu.py: {why}", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    total = sum(BUDGETS_S[section] for section in arguments.section)
    share = 1.0 if arguments.budget_s is None else arguments.budget_s / total
    if arguments.one_section:
        budget_s = BUDGETS_S[arguments.one_section] if arguments.budget_s is None else arguments.budget_s
        return run_section(arguments.one_section, arguments.output, arguments.device, budget_s)

    from gpu_sections.processes import STOPPED, Limited
    from gpu_sections.promises import judge
    from gpu_sections.table import promises_text, section_text

    from fastattn.bench import capture_environment

    summary: dict[str, Any] = {"environment": capture_environment(), "sections": {}, "clocks": {}}
    found: dict[str, Any] = {}
    failed = False
    for section in arguments.section:
        budget_s = BUDGETS_S[section] * share
        command = [
            sys.executable, str(Path(__file__).resolve()), "--one-section", section, "--section", section,
            "--output", str(arguments.output.resolve()), "--device", arguments.device,
            "--budget-s", str(budget_s),
        ]  # fmt: skip
        path = arguments.output / f"{section}.json"
        path.unlink(missing_ok=True)
        before = clocks()
        status = Limited(command, ROOT, os.environ, None).wait(budget_s + GRACE_S)
        summary["clocks"][section] = {"before": before, "after": clocks()}
        words = {0: "passed", STOPPED: "stopped at its time limit"}.get(status, "failed")
        summary["sections"][section] = {"status": words, "exit_status": status}
        failed |= status != 0
        if path.exists():
            found[section] = json.loads(path.read_text())
            print(section_text(found[section]), flush=True)
        print(f"{section}: {words}\n", flush=True)
        gpu = (summary["environment"]["gpu"] or {}).get("name", "")
        summary["promises"] = judge(found, gpu)
        (arguments.output / "summary.json").write_text(json.dumps(summary, indent=1))
    judged = [promise for promise in summary["promises"] if promise["section"] in arguments.section]
    if judged:
        print(promises_text(judged))
    return 1 if failed or any(promise["held"] is False for promise in judged) else 0


if __name__ == "__main__":
    raise SystemExit(main())
