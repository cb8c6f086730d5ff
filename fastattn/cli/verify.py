"""`fastattn verify MODEL`: swap the model's layers and compare it with itself unswapped, in every way of
running it that breaks implementations.
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
    parser.add_argument(
        "--case",
        action="append",
        metavar="NAME",
        help='run this case alone ("left padding", "static cache", "compile", ...); may be repeated',
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import torch
    from tqdm import tqdm

    import fastattn
    from fastattn.cli import UserError
    from fastattn.cli.models import load_model
    from fastattn.verification import CASES

    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise UserError(f"--device is {args.device!r}; accepted are cpu and cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch sees no CUDA or ROCm device")
    unknown = [name for name in args.case or () if name not in CASES]
    if unknown:
        raise UserError(f"--case is {unknown[0]!r}; a case is one of {', '.join(CASES)}")
    model, _ = load_model(args.model)
    model.to(device=device, dtype=getattr(torch, args.dtype))
    swapped = fastattn.optimize(model)
    with tqdm(total=len(args.case or CASES), disable=None, unit="case", leave=False) as bar:

        def show(case: str) -> None:
            bar.set_description(case)
            bar.update()

        try:
            report = fastattn.verify(model, cases=args.case, progress=show)
        except fastattn.VerificationError as error:
            report, status = error.report, 1
        else:
            status = 0
    if args.json:
        print(json.dumps({"swap": swapped.to_dict(), "verify": report.to_dict()}, indent=2))
    else:
        print(swapped.table(), report.table(), sep="\n\n")
    return status
