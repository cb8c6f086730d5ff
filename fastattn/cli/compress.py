"""`fastattn compress MODEL --train FILE --evaluate FILE --output DIR`: what compressions of a model cost and
gain, measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HELP = "try compressions of a model and measure accuracy, size and speed of each on this machine"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--train",
        required=True,
        metavar="FILE",
        help="what pruned models are recovered on: a text a line, with a tab and a label for a classifier, "
        "with a tab and its target for an encoder-decoder",
    )
    parser.add_argument(
        "--evaluate", required=True, metavar="FILE", help="what they are measured on, likewise"
    )
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="models, sweep.json and sweep.html; resumed if there"
    )
    parser.add_argument(
        "--points", metavar="FILE", help="JSON, a list of what fastattn.compress.sweep takes as points"
    )
    parser.add_argument(
        "--seq", type=int, default=128, metavar="N", help="texts are cut to N tokens (default 128)"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of each recovery (default 3)")
    parser.add_argument("--learning-rate", type=float, default=5e-5, help="of each recovery (default 5e-5)")
    parser.add_argument("--batch-size", type=int, default=32, help="of recovery and timing (default 32)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of recovery (default fp32)"
    )
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="begin no point after so many seconds"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from fastattn.cli import UserError
    from fastattn.cli.compress_task import TextTask
    from fastattn.cli.models import load_model
    from fastattn.compress import recover, sweep

    points = "auto" if args.points is None else _points(args.points)
    if Path(args.output).exists() and not Path(args.output).is_dir():
        raise UserError(f"--output {args.output} is a file; name a folder")
    model, tokenizer = load_model(args.model)
    task = TextTask.of(model, tokenizer, args.train, args.evaluate, args.seq)

    def recovered(student: Any, teacher: Any, folder: Path) -> None:
        recover(
            student,
            teacher,
            task.train_rows,
            output_dir=folder,
            epochs=args.epochs,
            learning_rate=args.learning_rate,
            batch_size=args.batch_size,
            tokenizer=tokenizer,
            precision=args.precision,
        )

    result = sweep(
        model,
        task.evaluate,
        points,
        folder=args.output,
        recover=recovered,
        calibration=task.calibration(),
        workload=task.timed_batches(args.batch_size),
        budget_s=args.budget,
        higher_is_better=task.higher_is_better,
    )
    print(json.dumps(result.to_dict(), indent=1) if args.json else result.table())
    written = [name for name in ("sweep.json", "sweep.html") if (Path(args.output) / name).is_file()]
    print(f"wrote {' and '.join(written)} in {args.output}", file=sys.stderr)
    return 0 if any(point.status == "measured" for point in result.points[1:]) else 1


def _points(file: str) -> Any:
    from fastattn.cli import UserError

    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--points {file} cannot be read: {error}") from error
