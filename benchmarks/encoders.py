"""The committed figures: BERT-base and MiniLM on this machine, and whether they hold what is promised.

    python benchmarks/encoders.py --name cpu-encoders                   # about eight minutes on two cores
    python benchmarks/encoders.py --name gpu-encoders --device cuda     # the same on a GPU

Writes benchmarks/results/NAME.json; `python benchmarks/readme_table.py` then renews the README's figures.
The exit status is 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fastattn
from fastattn.bench import BenchmarkResult, Measurement, Workload, paired_ratio
from fastattn.bench.files import require_writable, write_text
from fastattn.cli.models import load_model
from fastattn.report import format_table

RESULTS = Path(__file__).parent / "results"
SCHEMA = "fastattn.results/1"

RAGGED, FULL, SINGLE = Workload(8, 128, 0.47), Workload(8, 128, 1.0), Workload(1, 128, 1.0)
TITLES = {"bert-base-random": "BERT-base, random weights", "minilm": "all-MiniLM-L6-v2"}
CONTENDERS = {
    "cpu": ("eager", "sdpa", "fastattn", "onnx", "transformers-onnx"),
    "cuda": ("eager", "sdpa", "compile", "fastattn"),
}


@dataclass(frozen=True)
class Promise:
    """A ratio that must be reached: its value, or for "not slower" the lower end of its interval."""

    workload: Workload
    contender: str
    over: str
    at_least: float
    bound: str = "value"

    def __post_init__(self) -> None:
        if self.bound not in ("value", "low"):
            raise ValueError(f"bound is {self.bound!r}; it must be value or low")


# BERT-base on two cores. Over 1 needs a margin of its own: "not slower" is a lower bound of 0.97.
PROMISES = (
    Promise(RAGGED, "fastattn fp32", "the baseline", 2.1),
    Promise(RAGGED, "fastattn bf16", "eager fp32", 4.3),
    Promise(RAGGED, "fastattn ONNX fp32", "transformers ONNX fp32", 1.8),
    Promise(FULL, "fastattn fp32", "SDPA fp32", 0.97, "low"),
    Promise(FULL, "fastattn bf16", "SDPA bf16", 0.97, "low"),
    Promise(SINGLE, "fastattn fp32", "SDPA fp32", 0.97, "low"),
    Promise(SINGLE, "fastattn bf16", "SDPA bf16", 0.97, "low"),
)


def judge(promise: Promise, measurement: Measurement) -> dict[str, Any]:
    """The promise beside what was measured; it does not hold where a row is missing or its parity failed."""
    base_name = measurement.baseline.name if measurement.baseline else "a baseline"
    over = base_name if promise.over == "the baseline" else promise.over
    rows = {row.name: row for row in measurement.rows}
    row, base = rows.get(promise.contender), rows.get(over)
    verdict = {
        **asdict(promise),
        "workload": str(promise.workload),
        "over": over,
        "ratio": None,
        "holds": False,
    }
    if row is None or base is None or not row.wall_ms or not base.wall_ms:
        missing = row.reason if row is not None and row.reason else f"needs {over} measured"
        return {**verdict, "reason": missing}
    ratio = paired_ratio(base.wall_ms, row.wall_ms, over)
    if ratio is None or row.parity is None or not row.parity.passed:
        return {**verdict, "reason": "no ratio without parity and five rounds"}
    return {**verdict, "ratio": ratio.to_dict(), "holds": getattr(ratio, promise.bound) >= promise.at_least}


def judgements(result: BenchmarkResult) -> list[dict[str, Any]]:
    """Every promise about the workloads of a result."""
    found = {each.workload: each for each in result.measurements}
    return [judge(promise, found[promise.workload]) for promise in PROMISES if promise.workload in found]


def verdicts_table(verdicts: list[dict[str, Any]]) -> str:
    rows = []
    for each in verdicts:
        ratio = each["ratio"]
        found = (
            each["reason"]
            if ratio is None
            else f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
        wanted = f">= {each['at_least']}" + (" (lower bound)" if each["bound"] == "low" else "")
        holds = "yes" if each["holds"] else "NO"
        rows.append((each["workload"], each["contender"], each["over"], wanted, found, holds))
    return format_table(("workload", "contender", "over", "promised", "measured (95%)", "holds"), rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--models", default="bert-base-random,minilm", help="as `fastattn bench` takes them")
    parser.add_argument("--device", default="cpu", choices=sorted(CONTENDERS))
    parser.add_argument("--budget", type=float, default=180.0, metavar="SECONDS", help="timing of each model")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    target = require_writable(args.output / f"{args.name}.json")

    entries, verdicts = [], []
    for name in args.models.split(","):
        model, _ = load_model(name)
        result = fastattn.benchmark(
            model,
            device=args.device,
            contenders=CONTENDERS[args.device],
            workloads=[RAGGED, FULL, SINGLE],
            dtypes=["fp32", "bf16"],
            budget_s=args.budget,
            progress=True,
        )
        title = TITLES.get(name, Path(name).name)
        print(f"{title}\n{result.table()}\n")
        entries.append({"title": title, "result": result.to_dict()})
        if name == "bert-base-random" and args.device == "cpu":
            verdicts = judgements(result)
    command = f"python benchmarks/encoders.py --name {args.name} --device {args.device}"
    document = {"schema": SCHEMA, "name": args.name, "command": command, "models": entries}
    text = json.dumps({**document, "promises": verdicts}, indent=1, allow_nan=False)
    write_text(target, f"{text}\n")
    if verdicts:
        print(verdicts_table(verdicts))
    return 0 if all(each["holds"] for each in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
