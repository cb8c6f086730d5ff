"""`fastattn bench --compare OLD NEW`: which rows became slower, with an exit status for CI."""

from __future__ import annotations

import argparse
import json
import math

__all__ = ["add_compare_arguments", "run_compare"]

_PRINT = "-"


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a comparison; it shares --json and --markdown with `fastattn bench`."""
    two = parser.add_argument_group(
        "comparing two runs: JSON of this command or of pytest-benchmark (exit status 1 where one is slower)"
    )
    two.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="compare two files and run nothing")
    two.add_argument(
        "--fail-over",
        default="5%",
        metavar="PERCENT",
        help="fail where a row is surely slower by more than this: 5%% or 0.05 (default 5%%)",
    )
    two.add_argument(
        "--metric",
        default="auto",
        help="what is judged: time, speed-up (over the baseline, immune to a machine slower today), or "
        "auto: the speed-up where both files have it, else the time (default)",
    )


def run_compare(args: argparse.Namespace) -> int:
    """Compare the two files; 0 where no row failed, 1 where one did.

    Raises:
        UserError, OSError, ValueError: the threshold or a file cannot be read (exit status 2).
    """
    from fastattn.bench.comparison import compare_runs
    from fastattn.bench.files import require_writable, write_text
    from fastattn.bench.runs import read_run
    from fastattn.cli import UserError

    fail_over = _threshold(args.fail_over)
    for option in ("csv", "html"):
        if getattr(args, option):
            raise UserError(f"--compare writes --json and --markdown, not --{option}")
    for path in (args.json, args.markdown):
        if path not in (None, _PRINT):
            require_writable(path)
    old, new = (read_run(path) for path in args.compare)
    comparison = compare_runs(old, new, fail_over, args.metric)
    outputs = {
        args.json: json.dumps(comparison.to_dict(), indent=1, allow_nan=False) + "\n" if args.json else "",
        args.markdown: comparison.markdown() if args.markdown else "",
    }
    print(outputs.get(_PRINT) or comparison.text())
    for path, text in outputs.items():
        if path not in (None, _PRINT):
            write_text(path, text)
    return 1 if comparison.failed else 0


def _threshold(text: str) -> float:
    """A fraction from "5%" or "0.05". A bare "5" could be meant as either and is refused."""
    from fastattn.cli import UserError

    percent = text.strip().endswith("%")
    try:
        value = float(text.strip().removesuffix("%")) / (100 if percent else 1)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf or (not percent and value >= 1):
        raise UserError(
            f"--fail-over is {text!r}; it must be a percentage such as 5% or a fraction such as 0.05"
        )
    return value
