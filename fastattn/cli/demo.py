"""`fastattn demo`: the pretrained MiniLM before and after the swap, on real sentences, with a report."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

HELP = "make a pretrained model faster on this machine and show that its answers stay the same"

QUERY = "How do I keep my laptop from overheating?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="demo-output", metavar="FOLDER", help="where report.html and report.json go"
    )
    parser.add_argument("--query", default=QUERY, help="what to look for among the demonstration's sentences")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (default cpu)"
    )
    parser.add_argument(
        "--budget", type=float, default=45.0, metavar="SECONDS", help="time spent timing (default 45)"
    )
    parser.add_argument("--json", action="store_true", help="print the JSON instead of text")


def run(args: argparse.Namespace) -> int:
    from fastattn.cli import UserError

    if not args.budget > 0:
        raise UserError(f"--budget is {args.budget:g}; it must be more than 0 seconds")
    try:
        from fastattn.demo.run import run_demo
    except ModuleNotFoundError as error:
        raise UserError(f'the demonstration needs {error.name}: pip install "fastattn[all]"') from error
    from tqdm import tqdm

    def show(text: str) -> None:
        # Through tqdm, so that the text and the progress bar do not share a line.
        tqdm.write(f"{text}\n", file=sys.stdout)

    result = run_demo(
        args.output,
        query=args.query,
        device=args.device,
        budget_s=args.budget,
        show=None if args.json else show,
    )
    if args.json:
        print(json.dumps(result.to_dict(), indent=1))
    report = Path(args.output, "report.html")
    print(f"wrote {report} and {report.with_suffix('.json')}", file=sys.stderr)
    return 0 if result.passed else 1
