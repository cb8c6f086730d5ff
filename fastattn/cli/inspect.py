"""`fastattn inspect MODEL`: what optimize would swap, without changing anything."""

from __future__ import annotations

import argparse
import json

HELP = "show which layers of a model would be swapped, and why others would not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these modules alone"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    from fastattn.cli.models import load_model
    from fastattn.swap import plan

    model, _ = load_model(args.model)
    report = plan(model, args.exclude)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.table())
    return 0
