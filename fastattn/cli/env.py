"""`fastattn env`: the environment a benchmark records, for a bug report or beside a figure."""

from __future__ import annotations

import argparse
import json

HELP = "print what a time measured here depends on: processor, memory, versions, commit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    from fastattn.bench.environment import capture_environment, environment_text

    environment = capture_environment()
    print(json.dumps(environment, indent=2) if args.json else environment_text(environment))
    return 0
