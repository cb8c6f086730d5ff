"""The committed figures: five models, what they are used for, and every contender that is installed here.

    python benchmarks/suite.py                             # all five, about fifty minutes on two cores
    python benchmarks/suite.py --models gpt2,t5-small      # some
    python benchmarks/suite.py --device cuda               # on a GPU: gpu-minilm.json and so on

Writes benchmarks/results/DEVICE-MODEL.json; `make figures` then renews the README's figures and plots.
Engines of others are measured where installed (`pip install openvino ctranslate2`, and for optimum
`make .venv-optimum/.installed`) and named as missing where not. The exit status is 1 where a promise does
not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export_quality import quality_figures

import fastattn
from fastattn.bench import BenchmarkResult, Measurement, Workload, paired_ratio
from fastattn.bench.files import require_writable, write_text
from fastattn.bench.text import workload_from_text
from fastattn.cli.models import load_model
from fastattn.report import format_table

RESULTS = Path(__file__).parent / "results"
SCHEMA = "fastattn.suite/1"

RAGGED, FULL, SINGLE = Workload(8, 128, 0.47), Workload(8, 128), Workload(1, 128)
TRAIN = Workload(8, 128, 0.47, task="train")
PREFILL = Workload(1, 128, task="prefill")
DECODE = Workload(1, 128, task="decode", new_tokens=64)
DECODE_BATCH = Workload(4, 128, 0.6, task="decode", new_tokens=16)
TRAIN_DECODER = Workload(2, 128, task="train")
TRANSLATE, TRANSLATE_BATCH = (
    Workload(1, 64, task="decode", new_tokens=32),
    Workload(8, 64, 0.6, task="decode", new_tokens=16),
)

# "Not slower" is a lower bound of 0.97.
NOT_SLOWER = 0.97
# Every engine there is.
CONTENDERS: str | list[str] = "all"
FP32_PEERS = ("transformers ONNX fp32", "ONNX Runtime optimizer fp32", "OpenVINO fp32")
INT8_PEERS = ("transformers ONNX int8", "ONNX Runtime int8")


@dataclass(frozen=True)
class Promise:
    """A ratio that must be reached: its value, or for "not slower" the lower end of its interval.

    Attributes:
        over: names of rows, of which the fastest measured counts; empty for the baseline.
    """

    workload: Workload
    contender: str
    over: tuple[str, ...]
    at_least: float
    bound: str = "value"

    def __post_init__(self) -> None:
        if self.bound not in ("value", "low"):
            raise ValueError(f"bound is {self.bound!r}; it must be value or low")


@dataclass(frozen=True)
class Suite:
    """One model and what it is asked to do.

    Attributes:
        title: in tables.
        model: as `fastattn bench` takes it.
        workloads: made when it runs, for some need data.
        promises: judged on a CPU.
        figures: more figures of this model that are no times.
        axes: along which the first workload is measured.
    """

    title: str
    model: str
    workloads: Callable[[], list[Workload]]
    promises: tuple[Promise, ...] = ()
    figures: Callable[[Path], list[dict[str, Any]]] | None = None
    axes: tuple[str, ...] = ()


def sentences() -> Workload:
    """64 sentences of STS-B, as MiniLM's tokenizer cuts them."""
    _, tokenizer = load_model("minilm")
    return workload_from_text(data("stsb/sentences"), tokenizer, batch=64, seq=128)


def data(name: str) -> Path:
    """A file below FASTATTN_DATA; STS-B's sentences, a line each, are drawn from its table."""
    folder = Path(os.environ["FASTATTN_DATA"])
    if name != "stsb/sentences":
        return folder / name
    import csv

    with open(folder / "stsb" / "dev.csv", newline="", encoding="utf-8") as file:
        lines = [text.replace("\n", " ") for row in csv.reader(file) for text in row[:2]]
    target = Path(tempfile.mkdtemp(prefix="fastattn-suite-")) / "stsb-dev.txt"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


SUITES = {
    "minilm": Suite(
        "all-MiniLM-L6-v2",
        "minilm",
        lambda: [RAGGED, FULL, SINGLE, sentences(), TRAIN],
        figures=quality_figures,
        axes=("length", "batch", "fill"),
    ),
    "bert-base": Suite(
        "BERT-base, random weights",
        "bert-base-random",
        lambda: [RAGGED, FULL, SINGLE, TRAIN],
        (
            Promise(RAGGED, "fastattn fp32", (), 2.1),
            Promise(RAGGED, "fastattn bf16", ("eager fp32",), 4.3),
            Promise(RAGGED, "fastattn ONNX fp32", FP32_PEERS, 1.8),
            Promise(RAGGED, "fastattn ONNX int8", INT8_PEERS, 1.75),
            Promise(FULL, "fastattn fp32", ("SDPA fp32",), NOT_SLOWER, "low"),
            Promise(FULL, "fastattn bf16", ("SDPA bf16",), NOT_SLOWER, "low"),
            Promise(SINGLE, "fastattn fp32", ("SDPA fp32",), NOT_SLOWER, "low"),
            Promise(SINGLE, "fastattn bf16", ("SDPA bf16",), NOT_SLOWER, "low"),
            Promise(SINGLE, "fastattn ONNX fp32", FP32_PEERS, NOT_SLOWER, "low"),
            Promise(SINGLE, "fastattn ONNX int8", INT8_PEERS, 1.15),
        ),
    ),
    "gpt2": Suite(
        "GPT-2 124M, random weights",
        "gpt2-random",
        lambda: [PREFILL, DECODE, DECODE_BATCH, TRAIN_DECODER],
        (
            Promise(DECODE, "fastattn fp32", ("SDPA fp32",), NOT_SLOWER, "low"),
            Promise(DECODE, "fastattn ONNX int8-weight", ("CTranslate2 int8",), 2.0),
            Promise(DECODE, "fastattn ONNX int4-weight", ("CTranslate2 int8",), 3.0),
        ),
    ),
    "t5-small": Suite(
        "T5-small, random weights",
        "t5-small-random",
        lambda: [RAGGED, TRANSLATE, TRANSLATE_BATCH, TRAIN_DECODER],
        (Promise(TRANSLATE, "fastattn fp32", ("SDPA fp32",), NOT_SLOWER, "low"),),
    ),
    "llama-100m": Suite(
        "Llama, 100M shape, random weights",
        "llama-100m-random",
        lambda: [PREFILL, DECODE, DECODE_BATCH, TRAIN_DECODER],
        (Promise(DECODE, "fastattn fp32", ("SDPA fp32",), NOT_SLOWER, "low"),),
    ),
}


def judge(promise: Promise, measurement: Measurement) -> dict[str, Any]:
    """The promise beside what was measured; it does not hold where a row is missing or its parity failed."""
    rows = {row.name: row for row in measurement.rows}
    base = [measurement.baseline.name] if measurement.baseline else []
    timed = [rows[name] for name in promise.over or base if name in rows and rows[name].wall_ms]
    best = min(timed, key=lambda row: row.median_ms or 0.0, default=None)
    row = rows.get(promise.contender)
    verdict = {
        **asdict(promise),
        "workload": str(promise.workload),
        "over": best.name if best else ", ".join(promise.over) or "the baseline",
        "ratio": None,
        "holds": False,
        "reason": "",
    }
    if row is None or best is None or not row.wall_ms:
        missing = row.reason if row is not None and row.reason else f"needs {verdict['over']} measured"
        return {**verdict, "reason": missing}
    ratio = paired_ratio(best.wall_ms, row.wall_ms, best.name)
    if ratio is None or row.parity is None or not row.parity.passed:
        return {**verdict, "reason": "no ratio without parity and six rounds"}
    return {**verdict, "ratio": ratio.to_dict(), "holds": getattr(ratio, promise.bound) >= promise.at_least}


def judgements(suite: Suite, result: BenchmarkResult) -> list[dict[str, Any]]:
    """Every promise about the workloads of a result."""
    found = {each.workload: each for each in result.measurements}
    return [
        judge(promise, found[promise.workload]) for promise in suite.promises if promise.workload in found
    ]


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


def measured(name: str, device: str, budget_s: float, command: str) -> tuple[dict[str, Any], bool]:
    """One suite's document, and whether everything it promises holds."""
    suite = SUITES[name]
    model, _ = load_model(suite.model)
    result = fastattn.benchmark(
        model,
        device=device,
        contenders=CONTENDERS,
        workloads=suite.workloads(),
        dtypes=["fp32", "bf16"],
        budget_s=budget_s,
        with_roofline=True,
        scaling_axes=suite.axes,
        progress=True,
    )
    print(f"{suite.title}\n{result.table()}\n", flush=True)
    if result.interrupted:
        raise KeyboardInterrupt
    verdicts = judgements(suite, result) if device == "cpu" else []
    figures: list[dict[str, Any]] = []
    if suite.figures is not None and device == "cpu":
        with tempfile.TemporaryDirectory() as folder:
            figures = suite.figures(Path(folder))
    if verdicts:
        print(verdicts_table(verdicts), flush=True)
    run = {"title": suite.title, "result": result.to_dict(), "promises": verdicts, "figures": figures}
    document = {
        "schema": SCHEMA,
        "name": f"{device}-{name}",
        "command": command,
        "environment": result.environment,
        "runs": [run],
    }
    return document, all(each["holds"] for each in [*verdicts, *figures])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(SUITES), help=f"out of {', '.join(SUITES)}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=45.0, metavar="SECONDS", help="timing of each model")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if unknown := [name for name in names if name not in SUITES]:
        parser.error(f"--models names {unknown[0]!r}; it must be out of {', '.join(SUITES)}")
    if "minilm" in names and not os.environ.get("FASTATTN_DATA"):
        parser.error("FASTATTN_DATA must name the folder with the data sets (stsb/dev.csv)")
    prefix = "gpu" if args.device == "cuda" else "cpu"
    targets = {name: require_writable(args.output / f"{prefix}-{name}.json") for name in names}
    # What `fastattn tune` found here is no part of a committed figure.
    os.environ["FASTATTN_CACHE"] = tempfile.mkdtemp(prefix="fastattn-suite-")
    held = True
    for name, target in targets.items():
        options = f"--models {name} --device {args.device} --budget {args.budget:g}"
        command = f"python benchmarks/suite.py {options}"
        document, holds = measured(name, args.device, args.budget, command)
        write_text(target, json.dumps(document, indent=1, allow_nan=False) + "\n")
        print(f"wrote {target.name}\n", flush=True)
        held &= holds
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
