"""`fastattn export MODEL OUTPUT_DIR`: the fused model as ONNX, verified in ONNX Runtime."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "export a model to ONNX, fused and padding-free, and verify the file in ONNX Runtime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "output_dir", metavar="OUTPUT_DIR", help="folder to write; made where it does not exist"
    )
    parser.add_argument("--precision", default="fp32", help="precision of the weights: fp32")
    parser.add_argument("--target", default="cpu", help="what will run the file: cpu")
    parser.add_argument("--task", help="the task, which must be that of the model's head; found if left out")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the file with the model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import fastattn
    from fastattn.cli.models import load_model

    model, tokenizer = load_model(args.model)
    try:
        result = fastattn.export(
            model,
            args.output_dir,
            precision=args.precision,
            target=args.target,
            task=args.task,
            tokenizer=tokenizer,
            verify=not args.no_verify,
        )
    except fastattn.VerificationError as error:
        print(f"fastattn export: the exported file differs from the model: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_dict(), indent=2) if args.json else result.table())
    return 0
