"""`fastattn export MODEL OUTPUT_DIR`: the fused model as ONNX, verified in ONNX Runtime."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "export a model to ONNX, fused and padding-free, and verify the file in ONNX Runtime"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; a folder of a SentenceTransformer too")
    parser.add_argument(
        "output_dir", metavar="OUTPUT_DIR", help="folder to write; made where it does not exist"
    )
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What `optimum-cli export fastattn` takes too."""
    from fastattn.onnx.targets import PRECISIONS, TARGETS

    parser.add_argument(
        "--precision", default="fp32", help=f"precision of the weights: {', '.join(PRECISIONS)}; default fp32"
    )
    parser.add_argument(
        "--target", default="cpu", help=f"what will run the file: {', '.join(TARGETS)}; default cpu"
    )
    parser.add_argument("--task", help="the task, which must be that of the model's head; found if left out")
    parser.add_argument(
        "--layouts",
        nargs="*",
        metavar="NAME",
        default="auto",
        help="whose loaders shall read the folder; default what the target is for",
    )
    parser.add_argument(
        "--reference",
        metavar="MODEL",
        help="the model that verification compares with; default the exported one's own weights",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text a line, for precision int8 with ranges measured beforehand",
    )
    parser.add_argument("--no-verify", action="store_true", help="do not compare the file with the model")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import fastattn
    from fastattn.cli.models import load_model_or_sentence_transformer
    from fastattn.cli.texts import text_batches, text_lines

    texts = None if args.calibration is None else text_lines("--calibration", args.calibration)
    model, tokenizer = load_model_or_sentence_transformer(args.model)
    reference = None
    if args.reference is not None:
        reference, _ = load_model_or_sentence_transformer(args.reference)
    try:
        result = fastattn.export(
            model,
            args.output_dir,
            precision=args.precision,
            target=args.target,
            task=args.task,
            tokenizer=tokenizer,
            layouts=args.layouts,
            verify=not args.no_verify,
            calibration=None if texts is None else list(text_batches("--calibration", texts, tokenizer)),
            reference=reference,
        )
    except fastattn.VerificationError as error:
        print(f"fastattn export: the exported file differs from the model: {error}", file=sys.stderr)
        return 1
    print(json.dumps(result.to_dict(), indent=2) if args.json else result.table())
    return 0
