"""Exports beside the other ways to deploy the same model on a CPU: BERT-base in fp32 and int8, GPT-2 token by
token.

    python benchmarks/exports.py --name cpu-exports              # about twelve minutes on two cores
    python benchmarks/exports.py --name cpu-exports --runs gpt-2

Writes benchmarks/results/NAME.json; `python benchmarks/readme_table.py` then renews the README's figures.
Peers that are not installed are named as missing. The exit status is 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import export_peers as peers
import torch
from export_quality import quality_figures
from families import RAGGED, SINGLE, build

import fastattn
from fastattn.bench import Workload
from fastattn.bench.environment import capture_environment
from fastattn.bench.files import require_writable, write_text
from fastattn.bench.parity import Parity
from fastattn.bench.ratio import METHOD
from fastattn.bench.timing import Contender, measure
from fastattn.report import format_table

RESULTS = Path(__file__).parent / "results"
SCHEMA = "fastattn.exports/1"

# "Not slower" is a lower bound of 0.97.
NOT_SLOWER = 0.97
PROMPT, NEW_TOKENS = 128, 64


@dataclass(frozen=True)
class Run:
    """One thing to do, ours beside the peers.

    Attributes:
        name: of the run.
        contenders: makes them, the first of them the untouched model in PyTorch.
        promises: our contender's name -> the ratio promised over the fastest peer of its precision.
        peers: our contender's name -> what it is measured against.
        real: where the output's positions are no padding; None where it is tokens.
        bound: "value", or "low" where the lower end of the interval is judged.
    """

    name: str
    contenders: Callable[[Path], Iterator[Contender]]
    promises: dict[str, float]
    peers: dict[str, tuple[str, ...]]
    real: torch.Tensor | None = None
    bound: str = "value"


def encode(folder: Path, workload: Workload, precision: str) -> Iterator[Contender]:
    """BERT-base with random weights, one batch."""
    model: Any = build("BertModel", "BertConfig")
    batch = workload.tokens(model.config.vocab_size, avoid=model.config.pad_token_id)
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])

    def untouched() -> Any:
        with torch.inference_mode():
            return model(**batch)[0]

    def ours() -> Callable[[], Any]:
        out = folder / f"bert-{precision}"
        if not out.exists():
            fastattn.export(model, out, precision=precision, verify=False)
        session = fastattn.load(out)
        return lambda: session(**batch)["last_hidden_state"]

    yield Contender("PyTorch fp32", untouched)
    for name, make in peers.ENCODERS[precision].items():
        yield Contender(name, prepare=lambda make=make: make(folder, model, batch), dtype=precision)
    yield Contender(f"fastattn ONNX {precision}", prepare=ours, dtype=precision, highlight=True)


def decode(folder: Path) -> Iterator[Contender]:
    """GPT-2 124M with random weights: 64 tokens after a prompt of 128, greedily."""
    model: Any = build("GPT2LMHeadModel", "GPT2Config", eos_token_id=None, bos_token_id=None)
    prompt = Workload(1, PROMPT).tokens(model.config.vocab_size)["input_ids"]
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}

    def generate(generator: Any) -> Any:
        with torch.inference_mode():
            return generator.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, PROMPT:]

    yield Contender("PyTorch fp32", lambda: generate(model))
    yield Contender(
        "CTranslate2 int8", prepare=lambda: peers.ctranslate2_generate(folder, model, prompt, NEW_TOKENS)
    )
    for precision in ("fp32", "int8-weight", "int4-weight"):

        def ours(precision: str = precision) -> Callable[[], Any]:
            out = folder / f"gpt2-{precision}"
            fastattn.export(model, out, precision=precision)
            loaded = fastattn.load(out)
            return lambda: generate(loaded)

        yield Contender(f"fastattn {precision}", prepare=ours, dtype=precision, highlight=True)


def _real(workload: Workload) -> torch.Tensor:
    return workload.tokens(10)["attention_mask"].bool()


_FP32 = tuple(peers.ENCODERS["fp32"])
_INT8 = tuple(peers.ENCODERS["int8"])
RUNS = (
    Run(
        "BERT-base 1 x 128, fp32",
        lambda folder: encode(folder, SINGLE, "fp32"),
        {"fastattn ONNX fp32": NOT_SLOWER},
        {"fastattn ONNX fp32": _FP32},
        _real(SINGLE),
        "low",
    ),
    Run(
        "BERT-base 8 x 128, 47% fill, fp32",
        lambda folder: encode(folder, RAGGED, "fp32"),
        {"fastattn ONNX fp32": 1.8},
        {"fastattn ONNX fp32": _FP32},
        _real(RAGGED),
    ),
    Run(
        "BERT-base 1 x 128, int8",
        lambda folder: encode(folder, SINGLE, "int8"),
        {"fastattn ONNX int8": 1.15},
        {"fastattn ONNX int8": _INT8},
        _real(SINGLE),
    ),
    Run(
        "BERT-base 8 x 128, 47% fill, int8",
        lambda folder: encode(folder, RAGGED, "int8"),
        {"fastattn ONNX int8": 1.75},
        {"fastattn ONNX int8": _INT8},
        _real(RAGGED),
    ),
    Run(
        f"GPT-2 124M, {NEW_TOKENS} tokens after {PROMPT}",
        decode,
        {"fastattn int8-weight": 2.0, "fastattn int4-weight": 3.0},
        dict.fromkeys(("fastattn int8-weight", "fastattn int4-weight"), ("CTranslate2 int8",)),
    ),
)


def check_of(expected: Any, real: torch.Tensor | None) -> Callable[[Contender, Any], Parity]:
    """At real positions. fp32 must agree (tokens: every one). Of a lower precision the mean cosine of the
    rows must be 0.99; of its tokens, which random weights make a matter of luck after the first, only their
    number counts: the loss of those exports is gated when they are written.
    """

    def check(contender: Contender, output: Any) -> Parity:
        found = torch.as_tensor(output)
        if found.shape != expected.shape:
            raise ValueError(f"shape {list(found.shape)}, the reference's is {list(expected.shape)}")
        if not expected.is_floating_point():
            differing = float((found != expected).double().mean())
            exact = contender.dtype == "fp32" and "int8" not in contender.name
            return Parity(differing, 1.0, 0.0 if exact else 1.0, "parity" if exact else "precision", "tokens")
        assert real is not None
        found, wanted = found[real].double(), expected[real].double()
        if contender.dtype == "fp32":
            return Parity(float((found - wanted).abs().max()), float(wanted.abs().max()), 1e-4)
        cosine = torch.nn.functional.cosine_similarity(found, wanted, dim=-1)
        return Parity(1.0 - float(cosine.mean()), 1.0, 1e-2, "precision", "1 - mean cosine")

    return check


def measured(run: Run, folder: Path, budget_s: float) -> dict[str, Any]:
    """The rows of one run, each with its ratio over PyTorch; and ours over the fastest peer."""
    entries = list(run.contenders(folder))
    assert entries[0].run is not None
    expected = entries[0].run()
    rows = measure(
        entries,
        check=check_of(expected, run.real),
        baseline=entries[0].name,
        budget_s=budget_s,
        min_rounds=9,
        progress=True,
        label=run.name,
    )
    return {"run": run.name, "rows": [row.to_dict() for row in rows], "promises": _judged(run, rows)}


def _judged(run: Run, rows: list[Any]) -> list[dict[str, Any]]:
    """What is promised beside what was measured; nothing holds without the peer's time or our parity."""
    from fastattn.bench import paired_ratio

    found = {row.name: row for row in rows}
    judged = []
    for name, at_least in run.promises.items():
        ours = found[name]
        timed = [found[peer] for peer in run.peers[name] if found[peer].wall_ms]
        best = min(timed, key=lambda row: row.median_ms, default=None)
        ratio = paired_ratio(best.wall_ms, ours.wall_ms, best.name) if best and ours.wall_ms else None
        passed = ours.parity is not None and ours.parity.passed
        holds = ratio is not None and passed and getattr(ratio, run.bound) >= at_least
        judged.append(
            {
                "run": run.name,
                "contender": name,
                "over": None if best is None else best.name,
                "at_least": at_least,
                "bound": run.bound,
                "ratio": None if ratio is None else ratio.to_dict(),
                "holds": holds,
            }
        )
    return judged


def table(results: list[dict[str, Any]], figures: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for row in result["rows"]:
            time = (
                row["reason"] if row["median_ms"] is None else f"{row['min_ms']:.1f} / {row['median_ms']:.1f}"
            )
            parity = row["parity"]
            rows.append(
                (result["run"], row["name"], time, f"{parity['relative_error']:.0e}" if parity else "-")
            )
    parts = [format_table(("run", "contender", "min / median ms", "error"), rows)]
    promised = []
    for each in [promise for result in results for promise in result["promises"]]:
        ratio = each["ratio"]
        reached = (
            "-" if ratio is None else f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
        promised.append(
            (
                each["run"],
                each["contender"],
                each["over"] or "-",
                f"{each['at_least']} ({each['bound']})",
                reached,
                "yes" if each["holds"] else "NO",
            )
        )
    header = ("run", "contender", "over", "promised", "measured (95%)", "holds")
    parts.append(format_table(header, promised))
    parts.append(
        format_table(
            ("figure", "promised", "measured", "holds"),
            [(f["figure"], f["promised"], f["measured"], "yes" if f["holds"] else "NO") for f in figures],
        )
    )
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--runs", default="", help="parts of names, separated by semicolons; all if left out")
    parser.add_argument("--budget", type=float, default=40.0, metavar="SECONDS", help="timing of each run")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    target = require_writable(args.output / f"{args.name}.json")
    wanted = [part.strip().lower() for part in args.runs.split(";") if part.strip()]
    runs = [run for run in RUNS if not wanted or any(part in run.name.lower() for part in wanted)]
    quality = not wanted or any("minilm" in part for part in wanted)
    if not runs and not quality:
        parser.error(f"--runs {args.runs!r} names none of: {', '.join(run.name for run in RUNS)}, MiniLM")
    if quality and not os.environ.get("FASTATTN_DATA"):
        parser.error("FASTATTN_DATA must name the folder with the data sets (stsb/dev.csv)")

    environment = capture_environment()
    with tempfile.TemporaryDirectory() as folder:
        results = [measured(run, Path(folder), args.budget) for run in runs]
        figures = quality_figures(Path(folder)) if quality else []
    document = {
        "schema": SCHEMA,
        "name": args.name,
        "command": f"python benchmarks/exports.py --name {args.name}",
        "method": METHOD,
        "environment": environment,
        "peers": peers.versions(),
        "results": results,
        "figures": figures,
    }
    write_text(target, json.dumps(document, indent=1, allow_nan=False) + "\n")
    print(table(results, figures))
    held = [each["holds"] for result in results for each in result["promises"]]
    return 0 if all([*held, *(figure["holds"] for figure in figures)]) else 1


if __name__ == "__main__":
    sys.exit(main())
