"""`fastattn quantize MODEL SCHEME --output DIR`: a quantized copy of a model, with what it costs by layer."""

from __future__ import annotations

import argparse
import json
from contextlib import nullcontext
from typing import Any

HELP = "quantize a model's linear layers and save it, with error, size and speed by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("scheme", metavar="SCHEME", help="int8, int8-weight, int4-weight or fp8")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder for the model")
    parser.add_argument(
        "--calibration", metavar="FILE", help="a text a line, for methods that learn from inputs"
    )
    parser.add_argument(
        "--method", default="auto", help="auto (default), absmax, hqq or gptq, which takes --calibration"
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="columns of an int4-weight group")
    parser.add_argument(
        "--smooth", type=float, metavar="ALPHA", help="SmoothQuant, 0 to 1; takes --calibration"
    )
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these modules alone"
    )
    parser.add_argument(
        "--faster-at",
        type=int,
        metavar="ROWS",
        help="quantize only layers that are faster for it on this machine at so many rows, the tokens of a "
        "batch",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import fastattn
    from fastattn.cli.models import load_model
    from fastattn.cli.texts import new_folder, text_batches, text_lines

    folder = new_folder("--output", args.output)
    texts = None if args.calibration is None else text_lines("--calibration", args.calibration)
    model, tokenizer = load_model(args.model)
    options: dict[str, Any] = {} if args.group_size is None else {"group_size": args.group_size}
    # Timed as the fused layers run them: those round an input of several products once.
    with nullcontext() if args.faster_at is None else fastattn.optimized(model):
        report = fastattn.quantize(
            model,
            args.scheme,
            calibration=None if texts is None else list(text_batches("--calibration", texts, tokenizer)),
            exclude=args.exclude,
            method=args.method,
            smooth=args.smooth,
            faster_at=args.faster_at,
            **options,
        )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.table())
    return 0
