"""`fastattn tune`: measure once what is fastest on this machine, for `optimize(mode="auto")` to read."""

from __future__ import annotations

import argparse
import json
import sys

HELP = "measure once what is fastest on this machine; optimize reads it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default)"
    )
    parser.add_argument("--budget", default="60", metavar="SECONDS", help="time spent timing (default 60)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--show", action="store_true", help="print what was measured before; measure nothing"
    )
    instead.add_argument("--clear", action="store_true", help="forget what was measured on this machine")


def run(args: argparse.Namespace) -> int:
    from fastattn.cli import UserError

    try:
        budget_s = float(args.budget)
    except ValueError:
        raise UserError(f"--budget is {args.budget!r}; it must be a number, such as 60") from None

    from fastattn.bench.files import require_writable
    from fastattn.processor import processor
    from fastattn.tuning.cache import cache_file, clear, load, save
    from fastattn.tuning.machine import this_machine
    from fastattn.tuning.tuner import resolved, tune

    path = cache_file()
    if args.clear or args.show:
        machine = this_machine(resolved(args.device))
        if args.clear:
            print(f"forgotten: {machine.key}" if clear(machine) else f"nothing was known of {machine.key}")
            return 0
        tuning = load(machine)
        if tuning is None:
            raise UserError(f"{path} has nothing of {machine.key}: run `fastattn tune`")
    else:
        # A minute of measuring is not to end with a folder that cannot be written.
        path.parent.mkdir(parents=True, exist_ok=True)
        require_writable(path)
        try:
            tuning = tune(args.device, budget_s, progress=True)
        except KeyboardInterrupt:
            print("fastattn tune: stopped; nothing was written", file=sys.stderr)
            return 130
        if (tuning.load_average or 0) > 0.25 * (processor()["usable_cores"] or 1):
            print(
                f"fastattn tune: the machine was busy (load {tuning.load_average}), which changes what is "
                "fastest; run it again when nothing else runs",
                file=sys.stderr,
            )
        save(tuning)
        print(f"wrote {path}", file=sys.stderr)
    print(json.dumps(tuning.to_dict(), indent=1) if args.json else tuning.table())
    return 0
