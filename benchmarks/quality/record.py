"""What a script of this folder writes: the sweep it measured, beside what was promised of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastattn.bench.files import write_text
from fastattn.compress.frontier import SweepPoint, SweepResult
from fastattn.report import format_table

__all__ = ["RESULTS", "SCHEMA", "linear_share", "loss", "promise", "record"]

SCHEMA = "fastattn.quality/1"
RESULTS = Path(__file__).resolve().parents[1] / "results"


def promise(name: str, measured: float | None, bound: float, *, at_least: bool = False) -> dict[str, Any]:
    """One figure with the bound it is held to; not held where it could not be measured."""
    holds = measured is not None and (measured >= bound if at_least else measured <= bound)
    return {
        "figure": name,
        "promised": f"{'>=' if at_least else '<='} {bound:g}",
        "measured": None if measured is None else float(f"{measured:.5g}"),
        "holds": holds,
    }


def loss(result: SweepResult, point: SweepPoint) -> float | None:
    """How much worse than the untouched model's the score is; below 0 where it is better."""
    before = result.untouched.score
    if before is None or point.score is None:
        return None
    return before - point.score if result.higher_is_better else point.score - before


def linear_share(model: Any) -> dict[str, float]:
    """The bytes held by quantized linear layers over those of the same weights in float32; nothing where
    there is none, and of an exported model.
    """
    if not isinstance(model, nn.Module):
        return {}
    from fastattn.layers.quantized_linear import QuantizedLinear

    packed = [each.packed_weight for each in model.modules() if isinstance(each, QuantizedLinear)]
    whole = sum(4 * each.out_features * each.in_features for each in packed)
    return {"linear_bytes_share": sum(each.nbytes for each in packed) / whole} if whole else {}


def record(name: str, result: SweepResult, promises: Sequence[dict[str, Any]]) -> int:
    """Print the result, write benchmarks/results/quality-NAME.json and return the exit status."""
    print(result.table(), end="\n\n")
    rows = [
        (each["figure"], each["promised"], each["measured"], "yes" if each["holds"] else "NO")
        for each in promises
    ]
    print(format_table(("figure", "promised", "measured", "holds"), rows))
    data = {
        "schema": SCHEMA,
        "name": name,
        "command": f"python benchmarks/quality/{name.replace('-', '_')}.py --output FOLDER",
        "promises": list(promises),
        "sweep": result.to_dict(),
    }
    path = write_text(RESULTS / f"quality-{name}.json", json.dumps(data, indent=1) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return 0 if all(each["holds"] for each in promises) else 1
