"""Quantized linears against float ones by scheme, rows and layer size: when a quantized layer is faster.

python benchmarks/quantized_linears.py                # measures, about ten minutes on a quiet machine
python benchmarks/quantized_linears.py --page         # only renews docs/quantized-linears.md
python benchmarks/quantized_linears.py --page --check # exit status 1 where it is out of date

Every layer is measured hot, one weight called again and again, and cold, each call with the next of as many
copies as a model of 24M parameters has: a model reads a layer's weight once a step, and from memory.
Contenders take turns, see `fastattn.bench.measure`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from tqdm import tqdm

from fastattn import ops
from fastattn.bench import Contender, compare, measure
from fastattn.bench.environment import capture_environment
from fastattn.ops.quantized_linear_cpu import choose, instructions

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "cpu-quantized-linears.json"
PAGE = HERE.parent / "docs" / "quantized-linears.md"
SCHEMA = "fastattn.quantized-linears/1"

ROWS = (1, 4, 16, 64, 128, 480, 1024)
# K, N: whose layers. Llama's is the 100M shape of the suite.
LAYERS = {
    (384, 384): "MiniLM attention",
    (384, 1536): "MiniLM feed-forward, in",
    (1536, 384): "MiniLM feed-forward, out",
    (768, 768): "BERT-base, GPT-2, Llama 100M attention",
    (768, 2304): "GPT-2 query, key and value",
    (768, 3072): "BERT-base, GPT-2 feed-forward, in",
    (3072, 768): "BERT-base, GPT-2 feed-forward, out",
    (768, 2048): "Llama 100M feed-forward, in",
    (2048, 768): "Llama 100M feed-forward, out",
}
SCHEMES = ("int8", "int8-weight", "int4-weight")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CACHES = ("hot", "cold")
_COLD_PARAMETERS = 24_000_000
# Relative to the largest output: of rows rounded to int8, and of bfloat16 results.
_TOLERANCE = {"int8": 0.03, "bf16": 0.02}


class StaleError(ValueError):
    """There are no results to write the page from, or they are of another kind."""


def contenders(
    rows: int, columns: int, outputs: int, copies: int
) -> tuple[list[Contender], Callable[[Contender, Any], Any]]:
    """A float layer of each dtype and a quantized one of each scheme and dtype, all of the same weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, columns, generator=generator) / columns**0.5
    bias = torch.randn(outputs, generator=generator)
    x = torch.randn(rows, columns, generator=generator)
    made, expected = [], {}
    for name, dtype in DTYPES.items():
        each, offset = x.to(dtype), bias.to(dtype)
        floats = itertools.cycle([weight.to(dtype, copy=True) for _ in range(copies)])
        made.append(Contender(name, _call(linear, each, floats, offset), dtype=name))
        expected[name] = linear(x, weight, bias)
        for scheme in SCHEMES:
            packed = ops.quantize_absmax(weight, scheme)
            expected[f"{scheme} {name}"] = linear(x, packed.dequantize(), bias)
            if dtype == torch.bfloat16:
                packed = ops.prepare(packed)
            weights = itertools.cycle([replace(packed, values=packed.values.clone()) for _ in range(copies)])
            run = _call(ops.quantized_linear, each, weights, offset)
            made.append(Contender(f"{scheme} {name}", run, dtype=name))

    def check(contender: Contender, found: Tensor) -> Any:
        tolerance = [limit for kind, limit in _TOLERANCE.items() if kind in contender.name.split(" ")]
        return compare(expected[contender.name], found.float(), tolerance=max([1e-4, *tolerance]))

    return made, check


def _call(function: Callable[..., Tensor], x: Tensor, weights: Any, bias: Tensor) -> Callable[[], Tensor]:
    return lambda: function(x, next(weights), bias)


def measure_all(budget_s: float, path: Path) -> None:
    """Measure every layer, number of rows and cache; `path` holds what there is after each of them."""
    results: list[dict[str, Any]] = []
    environment = capture_environment()
    points = list(itertools.product(LAYERS, ROWS, CACHES))
    for (columns, outputs), rows, cache in tqdm(points):
        copies = 1 if cache == "hot" else -(-_COLD_PARAMETERS // (columns * outputs))
        made, check = contenders(rows, columns, outputs, copies)
        with torch.inference_mode():
            measured = measure(
                made, check=check, baseline="fp32", budget_s=budget_s, min_sample_ms=0.5, resources=False
            )
        results += [
            {
                "in_features": columns,
                "out_features": outputs,
                "rows": rows,
                "cache": cache,
                "face": _face(row.name, columns, outputs, rows),
                **{
                    name: row.to_dict()[name]
                    for name in ("name", "status", "reason", "wall_ms", "ratio", "parity")
                },
            }
            for row in measured
        ]
        document = {"schema": SCHEMA, "environment": environment, "results": results}
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _face(name: str, columns: int, outputs: int, rows: int) -> str | None:
    """How a quantized contender computes, as `choose` says."""
    scheme, _, dtype = name.partition(" ")
    if scheme not in SCHEMES:
        return None
    packed = ops.quantize_absmax(torch.ones(outputs, columns), scheme)
    if dtype == "bf16":
        packed = ops.prepare(packed)
    return choose(packed, DTYPES[dtype], rows, instructions()).face


def page(document: Mapping[str, Any]) -> str:
    """docs/quantized-linears.md."""
    cpu = document["environment"]["cpu"]
    torch_version = document["environment"]["packages"]["torch"]
    lines = [
        "# When a quantized linear is faster",
        "",
        "Written by `python benchmarks/quantized_linears.py` from "
        "`benchmarks/results/cpu-quantized-linears.json`; never",
        "by hand.",
        "",
        f"Time of the float32 layer over the quantized one's, on {cpu['model']}, torch {torch_version},",
        f"{cpu['torch_threads']} threads: with the weight in the cache / read from memory. **Bold: use it**, "
        "faster than float32",
        "either way. Not bold: do not use it for speed, it only saves memory. M is the number of rows of the "
        "input: batch times",
        "length, or the batch where tokens are generated one at a time.",
        "",
    ]
    found = {
        (each["name"], each["in_features"], each["out_features"], each["rows"], each["cache"]): each["ratio"]
        for each in document["results"]
    }
    for name in (*(f"{scheme} {dtype}" for dtype in DTYPES for scheme in SCHEMES), "bf16"):
        title = "bfloat16, not quantized" if name == "bf16" else _title(name)
        lines += [f"## {title}", "", "| K | N | layer | " + " | ".join(f"M = {rows}" for rows in ROWS) + " |"]
        lines.append("|---|---|---|" + "---|" * len(ROWS))
        for (columns, outputs), layer in LAYERS.items():
            cells = [
                _cell([found.get((name, columns, outputs, rows, cache)) for cache in CACHES]) for rows in ROWS
            ]
            lines.append(f"| {columns} | {outputs} | {layer} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _title(name: str) -> str:
    scheme, dtype = name.split(" ")
    return f"{scheme}, {'float32' if dtype == 'fp32' else 'bfloat16'} input"


def _cell(ratios: Sequence[Mapping[str, Any] | None]) -> str:
    """Speed-ups hot and cold; bold where no interval reaches below 1."""
    if any(ratio is None for ratio in ratios):
        return "not measured"
    known = [ratio for ratio in ratios if ratio is not None]
    text = " / ".join(f"{ratio['value']:.2g}" for ratio in known)
    return f"**{text}**" if all(ratio["low"] >= 1.0 for ratio in known) else text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", action="store_true", help="only write the page, from the results there are")
    parser.add_argument("--check", action="store_true", help="with --page: compare instead of writing")
    parser.add_argument("--budget-s", type=float, default=2.0, help="seconds for each layer, M and cache")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    if not args.page:
        measure_all(args.budget_s, args.results)
    document = json.loads(args.results.read_text(encoding="utf-8"))
    if document.get("schema") != SCHEMA:
        raise StaleError(f"{args.results} holds no results of quantized linears")
    text = page(document)
    if args.check:
        if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
            print(f"{PAGE} disagrees with {args.results}", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
