"""`fastattn bench MODEL`: time a model before and after the swap here, parity beside every time."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from fastattn.bench import Workload

HELP = "time a model before and after the swap on this machine, parity beside every time"

_PRINT = "-"
_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, or auto: cuda where there is one (default)"
    )
    parser.add_argument("--batch", default="8", help="sequences a batch; several with commas (default 8)")
    parser.add_argument(
        "--seq", default="128", help="padded length in tokens; several with commas (default 128)"
    )
    parser.add_argument(
        "--fill",
        help="real tokens over all tokens, such as 0.47; several with commas (default 0.47,1 and batch 1)",
    )
    parser.add_argument("--dtypes", help="out of fp32,bf16,fp16 (default fp32, and bf16 where it is faster)")
    parser.add_argument(
        "--contenders",
        default="auto",
        help="out of eager,sdpa,compile,fastattn,onnx,transformers-onnx (default all but the last)",
    )
    parser.add_argument("--budget", default="60", metavar="SECONDS", help="time spent timing (default 60)")
    parser.add_argument(
        "--json", nargs="?", const=_PRINT, metavar="PATH", help="write JSON there, or print it"
    )
    parser.add_argument("--html", metavar="PATH", help="write a self-contained page with plots there")


def run(args: argparse.Namespace) -> int:
    from fastattn.bench.files import require_writable

    # Whatever is wrong with the arguments is said before minutes of measuring.
    budget_s = _number(args.budget, "--budget", float)
    outputs = [path for path in (args.html, args.json) if path not in (None, _PRINT)]
    for path in outputs:
        require_writable(path)
    if args.html:
        from fastattn.bench.report import require_plotly

        require_plotly()
    workloads = _workloads(args)
    contenders = "auto" if args.contenders == "auto" else args.contenders.split(",")
    dtypes = None if args.dtypes is None else args.dtypes.split(",")

    import fastattn
    from fastattn.bench.model_benchmark import check_choices
    from fastattn.cli.models import load_model

    check_choices(args.device, contenders, dtypes)
    model, _ = load_model(args.model)
    result = fastattn.benchmark(
        model,
        device=args.device,
        contenders=contenders,
        workloads=workloads,
        dtypes=dtypes,
        budget_s=budget_s,
        progress=True,
    )
    print(json.dumps(result.to_dict(), indent=1) if args.json == _PRINT else result.table())
    if args.json not in (None, _PRINT):
        result.write_json(args.json)
    if args.html:
        result.write_html(args.html)
    for path in outputs:
        print(f"wrote {path}", file=sys.stderr)
    return 0 if all(row.status != "wrong" for each in result.measurements for row in each.rows) else 1


def _workloads(args: argparse.Namespace) -> list[Workload]:
    from fastattn.bench import Workload
    from fastattn.cli import UserError

    batches = _numbers(args.batch, "--batch", int)
    lengths = _numbers(args.seq, "--seq", int)
    fills = _numbers(args.fill or "0.47,1", "--fill", float)
    shapes = [(batch, seq, fill) for seq in lengths for batch in batches for fill in fills]
    if args.fill is None:
        # A single sequence has no padding: it is measured full, next to batches of both fills.
        full = [(1, seq, 1.0) for seq in lengths]
        shapes = [shape for shape in shapes if shape[0] != 1] + full
    try:
        return [Workload(*shape) for shape in shapes]
    except ValueError as error:
        raise UserError(f"--batch, --seq or --fill: {error}") from error


def _numbers(text: str, option: str, kind: Callable[[str], _T]) -> list[_T]:
    return [_number(part, option, kind) for part in text.split(",")]


def _number(text: str, option: str, kind: Callable[[str], _T]) -> _T:
    from fastattn.cli import UserError

    try:
        return kind(text)
    except ValueError:
        what = "an integer, such as 8" if kind is int else "a number, such as 0.47"
        raise UserError(f"{option} is {text!r}; it must be {what}") from None
