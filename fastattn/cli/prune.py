"""`fastattn prune MODEL --heads .. --ffn .. --output DIR`: a smaller copy of a model."""

from __future__ import annotations

import argparse
import json

HELP = "remove a model's heads, neurons, layers or single weights and save what is left"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from fastattn.cli.models import MODEL_HELP

    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder for the model")
    what = parser.add_argument_group("what goes")
    what.add_argument(
        "--heads", default="0.0", help="of each attention layer: 0.25 for a quarter, 3 for three"
    )
    what.add_argument(
        "--ffn", default="0.0", help="of each feed-forward layer: 0.5 for half, 512 for so many"
    )
    what.add_argument("--layers", type=int, default=0, metavar="N", help="so many layers of each stack")
    what.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="heads and neurons that make it X times as fast here",
    )
    what.add_argument("--pattern", default="structured", help="structured (default), unstructured or 2:4")
    how = parser.add_argument_group("how it is chosen")
    how.add_argument("--importance", default="magnitude", help="magnitude (default), taylor or wanda")
    how.add_argument(
        "--calibration",
        metavar="FILE",
        help="a text a line, for taylor and wanda; with a tab and a label for a classifier's taylor",
    )
    how.add_argument(
        "--exclude", action="append", default=[], metavar="PATTERN", help="leave these modules alone"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    import torch

    import fastattn
    from fastattn.bench.contenders.source import kind_of
    from fastattn.cli.models import load_model
    from fastattn.cli.texts import labelled_lines, new_folder, text_batches, text_lines

    folder = new_folder("--output", args.output)
    heads, ffn = _amount("--heads", args.heads), _amount("--ffn", args.ffn)
    texts = None if args.calibration is None else text_lines("--calibration", args.calibration)
    model, tokenizer = load_model(args.model)
    calibration = None
    if texts is not None:
        labels: list[int] = []
        if kind_of(model) == "classifier" and args.importance == "taylor":
            pairs = labelled_lines("--calibration", args.calibration, model.config.num_labels)
            texts, labels = [text for text, _ in pairs], [label for _, label in pairs]
        calibration = list(text_batches("--calibration", texts, tokenizer))
        for batch in calibration if labels else ():
            count = len(batch["input_ids"])
            batch["labels"], labels = torch.tensor(labels[:count]), labels[count:]
    report = fastattn.prune(
        model,
        heads=heads,
        ffn=ffn,
        layers=args.layers,
        pattern=args.pattern,
        importance=args.importance,
        calibration=calibration,
        target_speedup=args.target_speedup,
        exclude=args.exclude,
    )
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    print(json.dumps(report.to_dict(), indent=2) if args.json else report.table())
    return 0


def _amount(option: str, text: str) -> float | int:
    """ "0.25" is a ratio, "3" a count."""
    from fastattn.cli import UserError

    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    raise UserError(f"{option} is {text!r}; it must be a ratio such as 0.25 or a count such as 3")
