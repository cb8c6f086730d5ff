"""`fastattn bench MODEL`: time a model before and after the swap here, parity beside every time;
`fastattn bench --compare OLD NEW`: what changed between two results.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from fastattn.bench import BenchmarkResult, Workload

HELP = "time a model before and after the swap on this machine, parity beside every time"

_PRINT = "-"
_INTERRUPTED = 130
# A full run of more seconds than this is preceded by a first answer.
_FIRST_ANSWER_S = 15.0
_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.bench_compare import add_compare_arguments
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", nargs="?", help=MODEL_HELP)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default)"
    )
    what = parser.add_argument_group("what is run (default: what this kind of model is used for)")
    what.add_argument("--tasks", help="out of encode,classify,prefill,decode,train")
    what.add_argument("--batch", help="sequences a batch; several with commas (default 8)")
    what.add_argument("--seq", help="padded length in tokens; several with commas (default 128)")
    what.add_argument("--fill", help="real tokens over all tokens, such as 0.47; several with commas")
    what.add_argument("--new-tokens", default="32", metavar="N", help="tokens a decode adds (default 32)")
    what.add_argument("--text", metavar="FILE", help="batches of this text file's lines, a sequence a line")
    who = parser.add_argument_group("who is measured")
    who.add_argument("--dtypes", help="out of fp32,bf16,fp16 (default fp32, and bf16 where it is faster)")
    who.add_argument(
        "--contenders",
        default="auto",
        help='names with commas, "all" for every engine that is installed, or auto (default): '
        "PyTorch, fastattn and its exports",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--budget", default="60", metavar="SECONDS", help="time spent timing (default 60)")
    how.add_argument(
        "--until",
        default="2%",
        metavar="PERCENT",
        help="stop early where every ratio is this sure (default 2%%); 0 uses the whole budget",
    )
    how.add_argument("--roofline", action="store_true", help="each operation against this machine's ceilings")
    how.add_argument("--scaling", metavar="AXES", help="measure along length,batch,fill")
    how.add_argument("--full", action="store_true", help="--roofline and --scaling length,batch,fill")
    how.add_argument(
        "--isolate",
        action="store_true",
        help="every contender in a process of its own: a crash is a row, too",
    )
    out = parser.add_argument_group("where it goes, beside the table")
    out.add_argument("--json", nargs="?", const=_PRINT, metavar="PATH", help="write JSON there, or print it")
    out.add_argument("--csv", metavar="PATH", help="write one line a row there")
    out.add_argument("--markdown", metavar="PATH", help="write tables there")
    out.add_argument("--html", metavar="PATH", help="write a self-contained page with plots there")
    add_compare_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from fastattn.bench.files import require_writable
    from fastattn.cli import UserError
    from fastattn.cli.bench_compare import run_compare

    if args.compare:
        if args.model:
            raise UserError(f"--compare reads two results and runs nothing: leave {args.model!r} out")
        return run_compare(args)
    if not args.model:
        raise UserError("name a MODEL to measure, or --compare OLD NEW")

    # Whatever is wrong with the arguments is said before minutes of measuring.
    budget_s = _number(args.budget, "--budget", float)
    until = _fraction(args.until, "--until") or None
    for path in (args.json, args.csv, args.markdown, args.html):
        if path not in (None, _PRINT):
            require_writable(path)
    if args.html:
        from fastattn.bench.report import require_plotly

        require_plotly()
    contenders = args.contenders if args.contenders in ("auto", "all") else args.contenders.split(",")
    dtypes = None if args.dtypes is None else args.dtypes.split(",")

    import fastattn
    from fastattn.bench.choices import check_choices, choose_workloads
    from fastattn.bench.contenders import kind_of
    from fastattn.bench.session import SCALING_AXES
    from fastattn.bench.workloads import maximum_positions
    from fastattn.cli.models import load_model

    check_choices(args.device, contenders, dtypes)
    axes = SCALING_AXES if args.full else tuple(args.scaling.split(",")) if args.scaling else ()
    for axis in axes:
        if axis not in SCALING_AXES:
            raise UserError(f"--scaling names {axis!r}; it must be out of {', '.join(SCALING_AXES)}")
    model, tokenizer = load_model(args.model)
    kind = kind_of(model)
    workloads = choose_workloads(_workloads(args, kind, tokenizer), kind, maximum_positions(model))
    result = first = None
    if budget_s > _FIRST_ANSWER_S:
        first = fastattn.benchmark(
            model, device=args.device, contenders="fastattn", workloads=workloads[0], dtypes="fp32",
            budget_s=_FIRST_ANSWER_S / 2, min_rounds=6, until=0.05, progress=True,
        )  # fmt: skip
        print(f"First answer, a few rounds; the full one follows.\n\n{first.table()}\n", file=sys.stderr)
    if first is None or not first.interrupted:
        result = fastattn.benchmark(
            model,
            device=args.device,
            contenders=contenders,
            workloads=workloads,
            dtypes=dtypes,
            budget_s=budget_s,
            until=until,
            with_roofline=args.roofline or args.full,
            scaling_axes=axes,
            isolate=args.isolate,
            progress=True,
        )
    if first is not None and (result is None or (result.interrupted and not _has_times(result))):
        # Interrupted before the full answer had a time: the first one is what was measured.
        result = replace(first, interrupted=True)
    assert result is not None
    print(json.dumps(result.to_dict(), indent=1) if args.json == _PRINT else result.table())
    written = _write(result, args)
    if result.interrupted:
        print("fastattn bench: interrupted; the above is what was measured", file=sys.stderr)
        return _INTERRUPTED
    right = all(row.status != "wrong" for each in result.measurements for row in each.rows)
    return 0 if right and written else 1


def _has_times(result: BenchmarkResult) -> bool:
    return any(row.wall_ms for each in result.measurements for row in each.rows)


def _write(result: BenchmarkResult, args: argparse.Namespace) -> bool:
    """Write every file asked for; one that cannot be written is said, and the others are."""
    writers: dict[str, Callable[[str], Path]] = {
        "json": result.write_json,
        "csv": result.write_csv,
        "markdown": result.write_markdown,
        "html": result.write_html,
    }
    all_written = True
    for name, write in writers.items():
        path = getattr(args, name)
        if path in (None, _PRINT):
            continue
        try:
            print(f"wrote {write(path)}", file=sys.stderr)
        except OSError as error:
            all_written = False
            print(f"fastattn bench: {path} was not written: {error}", file=sys.stderr)
    return all_written


def _workloads(args: argparse.Namespace, kind: Any, tokenizer: Any) -> str | list[Workload]:
    """The workloads the options name; "auto" where they name none."""
    from fastattn.bench import Workload
    from fastattn.bench.workloads import TASKS
    from fastattn.cli import UserError

    given = (args.tasks, args.batch, args.seq, args.fill, args.text)
    if not any(given):
        return "auto"
    usual = {"encoder": "encode", "classifier": "classify", "decoder": "prefill,decode"}
    tasks = (args.tasks or usual.get(kind, "encode,decode")).split(",")
    if unknown := [task for task in tasks if task not in TASKS]:
        raise UserError(f"--tasks names {unknown[0]!r}; it must be out of {', '.join(TASKS)}")
    batches = _numbers(args.batch or "8", "--batch", int)
    lengths = _numbers(args.seq or "128", "--seq", int)
    new_tokens = _number(args.new_tokens, "--new-tokens", int)
    fills = _numbers(args.fill, "--fill", float) if args.fill else []
    found: list[Workload] = []
    try:
        for task in tasks:
            more: dict[str, Any] = {"task": task, "new_tokens": new_tokens if task == "decode" else 0}
            for seq in lengths:
                if args.text:
                    asked = [(batch, fill) for batch in batches for fill in fills or (None,)]
                    found += [_of_text(args.text, tokenizer, batch, seq, fill, more) for batch, fill in asked]
                    continue
                shapes = [(batch, fill) for batch in batches for fill in fills or (0.47, 1.0)]
                if not fills:
                    # A single sequence has no padding: it is measured full, next to batches of both fills.
                    shapes = [shape for shape in shapes if shape[0] != 1] + [(1, 1.0)]
                found += [Workload(batch, seq, fill, **more) for batch, fill in shapes]
    except (ValueError, OSError) as error:
        raise UserError(f"--batch, --seq, --fill, --new-tokens or --text: {error}") from error
    return found


def _of_text(path: str, tokenizer: Any, batch: int, seq: int, fill: float | None, more: Any) -> Workload:
    from fastattn.bench.text import workload_from_text
    from fastattn.cli import UserError

    if tokenizer is None:
        raise UserError("--text needs the model's tokenizer, and there is none beside the model")
    return workload_from_text(path, tokenizer, batch=batch, seq=seq, fill=fill, **more)


def _numbers(text: str, option: str, kind: Callable[[str], _T]) -> list[_T]:
    return [_number(part, option, kind) for part in text.split(",")]


def _number(text: str, option: str, kind: Callable[[str], _T]) -> _T:
    from fastattn.cli import UserError

    try:
        return kind(text)
    except ValueError:
        what = "an integer, such as 8" if kind is int else "a number, such as 0.47"
        raise UserError(f"{option} is {text!r}; it must be {what}") from None


def _fraction(text: str, option: str) -> float:
    """ "2%" and "0.02" alike, at least 0 and below 1."""
    from fastattn.cli import UserError

    percent = text.endswith("%")
    value = _number(text.removesuffix("%"), option, float) / (100 if percent else 1)
    if not 0 <= value < 1:
        raise UserError(f"{option} is {text!r}; it must be at least 0% and below 100%, such as 2%")
    return value
