"""`fastattn verify MODEL`: swap the model's layers and compare it with itself unswapped on adversarial
batches.
"""

from __future__ import annotations

import argparse
import json

HELP = "swap a model's layers and compare the answers with the untouched model's"

DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="dtype of the weights")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import torch

    import fastattn
    from fastattn.cli import UserError
    from fastattn.cli.models import load_model

    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UserError(f"--device is {args.device!r}; accepted are cpu and cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch sees no CUDA or ROCm device")
    model, _ = load_model(args.model)
    model.to(device=device, dtype=getattr(torch, args.dtype))
    swapped = fastattn.optimize(model)
    try:
        report = fastattn.verify(model)
    except fastattn.VerificationError as error:
        report, status = error.report, 1
    else:
        status = 0
    if args.json:
        print(json.dumps({"swap": swapped.to_dict(), "verify": report.to_dict()}, indent=2))
    else:
        print(swapped.table(), report.table(), sep="\n\n")
    return status
