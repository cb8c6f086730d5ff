"""Writes the README's figures from benchmarks/results/*.json, between their two markers: none is ever typed.

python benchmarks/readme_table.py            # renews the block
python benchmarks/readme_table.py --check    # exit status 1 where it is out of date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
SCHEMA = "fastattn.results/1"
FAMILIES = "fastattn.families/1"
EXPORTS = "fastattn.exports/1"
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"

# Untouched contenders make the baseline's column; the others have one each.
UNTOUCHED = ("eager", "SDPA")


class StaleError(ValueError):
    """The README cannot hold the block: its markers are missing or doubled."""


def block(documents: list[dict[str, Any]]) -> str:
    """The Markdown of all results, markers included."""
    parts = [BEGIN]
    for document in documents:
        if document["schema"] == FAMILIES:
            where = _where({"settings": {"device": "cpu"}, "environment": document["environment"]})
            parts += [f"**Every kind of architecture**, fp32, {where}", "", *_runs(document["results"]), ""]
        elif document["schema"] == EXPORTS:
            where = _where({"settings": {"device": "cpu"}, "environment": document["environment"]})
            parts += [f"**Exports beside other ways to deploy**, {where}", "", *_exports(document), ""]
        else:
            for entry in document["models"]:
                parts += [
                    f"**{entry['title']}**, {_where(entry['result'])}",
                    "",
                    *_table(entry["result"]),
                    "",
                ]
        parts += [f"Reproduce with `{document['command']}`.", ""]
    parts += [
        "Each cell: median time of a batch, how many times as fast as the baseline of its row with the 95% "
        "interval, and the largest error at real positions relative to the output's scale, against the "
        "untouched model in fp32. Contenders ran interleaved in one process. What is gained below 100% fill "
        "is padding saved; what is left at 100% is fusion and, in bf16, precision.",
        END,
    ]
    return "\n".join(parts)


def _where(result: dict[str, Any]) -> str:
    environment, packages = result["environment"], result["environment"]["packages"]
    cpu, gpu = environment["cpu"], environment["gpu"]
    on_gpu = result["settings"]["device"] != "cpu" and gpu is not None
    machine = gpu["name"] if on_gpu else f"{cpu['model']}, {cpu['torch_threads']} threads"
    flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpu["flags"] and not on_gpu]
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "onnxruntime"))
    return f"{', '.join([machine, *flags])}; {versions}; {environment['date_utc'][:10]}"


def _runs(results: list[dict[str, Any]]) -> list[str]:
    """One model doing one thing a row, as benchmarks/families.py measures them."""
    lines = ["| run | baseline | fastattn |", "|---|---|---|"]
    for each in results:
        base = next((row for row in each["rows"] if row["baseline"]), None)
        baseline = "-" if base is None else f"{base['median_ms']:.3g} ms ({base['name']})"
        lines.append(f"| {each['run']} | {baseline} | {_cell(each['rows'][-1])} |")
    return lines


def _exports(document: dict[str, Any]) -> list[str]:
    """Every contender of every run as benchmarks/exports.py measures them, then what is promised of ours."""
    lines = ["| run | contender | median | over PyTorch |", "|---|---|---|---|"]
    for each in document["results"]:
        for row in each["rows"]:
            name = f"**{row['name']}**" if row["highlight"] else row["name"]
            time = "-" if row["median_ms"] is None else f"{row['median_ms']:.3g} ms"
            ratio = row["ratio"]
            speed = "1" if row["baseline"] else str(row["reason"] or "-").replace("|", "/")
            if ratio is not None:
                speed = f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
            lines.append(f"| {each['run']} | {name} | {time} | {speed} |")
    for figure in document["figures"]:
        lines.append(f"| {figure['figure']} | fastattn | {figure['measured']} | |")
    peers = ", ".join(f"{name} {number or 'not installed'}" for name, number in document["peers"].items())
    return [*lines, "", f"Peers: {peers}."]


def _table(result: dict[str, Any]) -> list[str]:
    rows = [row for each in result["measurements"] for row in each["rows"]]
    names = dict.fromkeys(row["name"] for row in rows if row["name"].rpartition(" ")[0] not in UNTOUCHED)
    lines = [f"| workload | baseline | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for measurement in result["measurements"]:
        found = {row["name"]: row for row in measurement["rows"]}
        base = found.get(measurement["baseline"] or "")
        baseline = "-" if base is None else f"{base['median_ms']:.3g} ms ({base['name']})"
        cells = [_workload(measurement["workload"]), baseline, *(_cell(found.get(name)) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _workload(workload: dict[str, Any]) -> str:
    return f"{workload['batch']} x {workload['seq']}, {workload['fill']:.0%} fill"


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    ratio, parity = row["ratio"], row["parity"]
    if ratio is None or parity is None or not parity["passed"]:
        return str(row["reason"] or "-").replace("|", "/")
    speed = f"**{ratio['value']:.2f}x** ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{row['median_ms']:.3g} ms, {speed}, error {parity['relative_error']:.0e}"


def load(folder: Path) -> list[dict[str, Any]]:
    """Every committed result, by file name."""
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    return [document for document in documents if document.get("schema") in (SCHEMA, FAMILIES, EXPORTS)]


def renewed(readme: str, documents: list[dict[str, Any]]) -> str:
    """The README's text with a fresh block.

    Raises:
        StaleError: the README does not have each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise StaleError(f"the README must have {BEGIN} and, after it, {END}, once each")
    before, _, rest = readme.partition(BEGIN)
    return before + block(documents) + rest.partition(END)[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where it is out of date")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    text = args.readme.read_text(encoding="utf-8")
    fresh = renewed(text, load(args.results))
    if fresh == text:
        return 0
    if args.check:
        print("the README's figures are out of date: run python benchmarks/readme_table.py", file=sys.stderr)
        return 1
    args.readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
