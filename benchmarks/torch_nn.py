"""The committed figures of plain torch.nn models: nn.TransformerEncoder against its own swapped copy.

    python benchmarks/torch_nn.py --name cpu-torch-nn                   # about three minutes on two cores
    python benchmarks/torch_nn.py --name gpu-torch-nn --device cuda

The baseline is PyTorch's own fast path: in evaluation without gradients nn.TransformerEncoder makes a nested
tensor of a batch with padding on the right (batch first, post-norm); each layer is one fused call either way.
Writes benchmarks/results/NAME.json. The exit status is 1 where a promise does not hold.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastattn
from fastattn.bench import Workload, measure
from fastattn.bench.environment import capture_environment
from fastattn.bench.files import require_writable, write_text
from fastattn.bench.parity import compare
from fastattn.bench.timing import Contender
from fastattn.report import format_table

RESULTS = Path(__file__).parent / "results"
SCHEMA = "fastattn.torch_nn/1"
BASELINE, OURS = "torch.nn fp32", "fastattn fp32"


@dataclass(frozen=True)
class Model:
    """An encoder and what it is run on; `promised` is the ratio that must be reached, None where none is."""

    d_model: int
    heads: int
    layers: int
    workload: Workload
    activation: str = "relu"
    norm_first: bool = False
    promised: float | None = None

    def __str__(self) -> str:
        order = ", pre-norm" if self.norm_first else ""
        return f"{self.layers} layers of {self.d_model}{order}, {self.activation}, {self.workload}"

    def build(self, device: str) -> nn.TransformerEncoder:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(
            self.d_model,
            self.heads,
            4 * self.d_model,
            activation=self.activation,
            batch_first=True,
            norm_first=self.norm_first,
        )
        with warnings.catch_warnings():
            # A pre-norm encoder is told that it makes no nested tensor.
            warnings.simplefilter("ignore")
            return nn.TransformerEncoder(layer, self.layers).eval().to(device)


# The size of torch.nn's own example in three batches, pre-norm, and without padding; and BERT's size.
MODELS = (
    Model(512, 8, 6, Workload(16, 128, 0.5), promised=1.5),
    Model(512, 8, 6, Workload(8, 128, 0.5)),
    Model(512, 8, 6, Workload(8, 512, 0.5), promised=1.5),
    Model(512, 8, 6, Workload(16, 128, 0.5), norm_first=True, promised=1.5),
    Model(768, 12, 12, Workload(8, 128, 0.5), activation="gelu"),
    Model(512, 8, 6, Workload(16, 128, 1.0)),
)


def run(model: Model, device: str, budget_s: float, progress: bool) -> dict[str, Any]:
    """One model: both contenders interleaved, parity at real positions, and whether the promise holds."""
    reference = model.build(device)
    swapped = copy.deepcopy(reference)
    fastattn.optimize(swapped)
    workload = model.workload
    src = torch.randn(workload.batch, workload.seq, model.d_model, device=device)
    mask = workload.tokens(10, device=device)["attention_mask"]
    padding = mask == 0

    def forward(encoder: nn.Module) -> Any:
        with torch.inference_mode():
            return {"output": encoder(src, src_key_padding_mask=padding)}

    expected = forward(reference)
    rows = measure(
        [
            Contender(BASELINE, lambda: forward(reference)),
            Contender(OURS, lambda: forward(swapped), highlight=True),
        ],
        check=lambda contender, output: compare(expected, output, mask=mask),
        baseline=BASELINE,
        device=device,
        budget_s=budget_s,
        progress=progress,
        label=str(model),
    )
    ratio = rows[1].ratio
    holds = None
    if model.promised is not None:
        holds = ratio is not None and ratio.value >= model.promised
    return {
        "model": {**asdict(model), "workload": workload.to_dict()},
        "title": str(model),
        "rows": [row.to_dict() for row in rows],
        "holds": holds,
    }


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for each in results:
        torch_row, ours = each["rows"]
        ratio, parity = ours["ratio"], ours["parity"]
        found = (
            ours["reason"] or "no ratio"
            if ratio is None
            else f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
        )
        error = "-" if parity is None else f"{parity['relative_error']:.0e}"
        wanted = each["model"]["promised"]
        verdict = "-" if wanted is None else f">= {wanted}: {'yes' if each['holds'] else 'NO'}"
        rows.append((each["title"], _median(torch_row), _median(ours), found, error, verdict))
    return format_table(("model", "torch.nn ms", "fastattn ms", "ratio (95%)", "error", "promised"), rows)


def _median(row: dict[str, Any]) -> str:
    wall = sorted(row["wall_ms"] or ())
    return f"{wall[len(wall) // 2]:.1f}" if wall else "-"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the file in benchmarks/results")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=25.0, metavar="SECONDS", help="timing of each model")
    parser.add_argument("--models", type=int, default=len(MODELS), metavar="N", help="only the first N")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = parser.parse_args(argv)
    target = require_writable(args.output / f"{args.name}.json")
    environment = capture_environment()
    results = [run(model, args.device, args.budget, progress=True) for model in MODELS[: args.models]]
    document = {
        "schema": SCHEMA,
        "name": args.name,
        "command": f"python benchmarks/torch_nn.py --name {args.name} --device {args.device}",
        "environment": environment,
        "models": results,
    }
    write_text(target, f"{json.dumps(document, indent=1, allow_nan=False, default=str)}\n")
    print(table(results))
    return 1 if any(each["holds"] is False for each in results) else 0


if __name__ == "__main__":
    sys.exit(main())
