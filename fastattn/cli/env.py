"""`fastattn env`: the environment a benchmark records, for a bug report or beside a figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "print what a time measured here depends on: processor, memory, versions, commit, tuning"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    from fastattn.bench.environment import capture_environment, environment_text
    from fastattn.tuning.cache import cache_file, machines

    path = cache_file()
    home = Path.home()
    tuning = {
        # For a bug report: without the user's name.
        "file": f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path),
        "machines": list(machines()),
    }
    environment = {**capture_environment(), "tuning": tuning}
    print(json.dumps(environment, indent=2) if args.json else environment_text(environment))
    return 0
