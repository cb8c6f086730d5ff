"""`fastattn <verb>`: one file a verb in this folder, found by name; heavy imports happen inside the verb."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

import fastattn

__all__ = ["UserError", "main", "run_verb"]

VERBS = ("demo", "inspect", "verify", "bench", "tune", "export", "quantize", "prune", "compress", "env")


class UserError(Exception):
    """Something the user can put right; printed as one line, exit status 2."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastattn", description=fastattn.__doc__)
    parser.add_argument("--version", action="version", version=f"fastattn {fastattn.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name in VERBS:
        module = import_module(f"fastattn.cli.{name}")
        verb = verbs.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit status: 0 done, 1 the check it made failed, 2 wrong use."""
    args = build_parser().parse_args(argv)
    return run_verb(args.verb, args.run, args)


def run_verb(verb: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run one verb with its parsed arguments; what the user can put right is one line on standard error."""
    try:
        status = run(args)
    except (UserError, ValueError, OSError, ImportError) as error:
        print(f"fastattn {verb}: {error}", file=sys.stderr)
        return 2
    return status
