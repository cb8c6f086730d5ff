"""Writes the figures of README.md, docs/figures.md and docs/figures/*.svg from benchmarks/results/*.json.

    python benchmarks/figures.py            # renews all of them (make figures)
    python benchmarks/figures.py --check    # names what is out of date; exit status 1 where something is

No figure is ever typed: README.md has the short table between its two markers, docs/figures.md all of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastattn.bench.files import write_text
from fastattn.bench.rows import percentiles
from fastattn.bench.saved import FAMILIES, SUITE, Measured, load_json, measured, workload_name
from fastattn.bench.tables import markdown_table, workload_table

sys.path.append(str(Path(__file__).parent))
from figure_plots import Candle, Panel, TimeBar, draw_latency, draw_speed_ups, drawn_by, drawn_here
from figure_quality import QUALITY, quality_lines, quality_summary

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
THEMES = ("light", "dark")
# What all others are compared with.
UNTOUCHED = ("eager fp32", "SDPA fp32")
# A panel of the latency plot: the fastest so many, and the baseline.
PANEL_BARS = 10


class StaleError(ValueError):
    """The README cannot hold the block: its markers are missing or doubled."""


def load(folder: Path) -> list[dict[str, Any]]:
    """Every committed result that figures are made of, by file name; a suite's first, compression last."""
    documents = [load_json(path) for path in sorted(folder.glob("*.json"))]
    order = (SUITE, FAMILIES, QUALITY)
    return sorted(
        (each for each in documents if each.get("schema") in order),
        key=lambda each: order.index(each["schema"]),
    )


def entries(documents: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """One entry a model and workload of all suites."""
    return [each for document in documents if document["schema"] == SUITE for each in measured(document)]


def readme_block(documents: Sequence[Mapping[str, Any]], has_plots: bool) -> str:
    """What stands between the README's markers, markers included."""
    found = entries(documents)
    compressed = [each for each in documents if each["schema"] == QUALITY]
    lines = [BEGIN, *_machines(documents), ""]
    if has_plots:
        lines += [
            _picture(
                "speed-ups", "Speed-up over the faster untouched model, by model and task, with intervals"
            ),
            _picture("latency", "Median time of a call, fastattn and other engines, by model"),
            "",
        ]
    columns = ["model and task", "untouched", "fastattn fp32", "fastest of fastattn", "fastest other"]
    lines += markdown_table(columns, [_line(each) for each in found])
    more = sum(len(document["results"]) for document in documents if document["schema"] == FAMILIES)
    others = f", {more} more runs over other architectures and tasks" if more else ""
    lines += [
        "",
        "Times as fast as the faster untouched model (eager or SDPA, fp32), with the 95% interval and the "
        "largest error relative to the output's scale; contenders took turns in one process. What is gained "
        "below 100% fill is padding saved; at 100% it is fusion and, in lower precision, precision. Every "
        f"contender, what was promised{others}, and the commands: [docs/figures.md](docs/figures.md).",
    ]
    if compressed:
        lines += [
            "",
            "Compression of models trained on real data ([docs/compress.md](docs/compress.md)): score, size "
            "and speed over the untouched model in fp32, all of it in [docs/figures.md](docs/figures.md).",
            "",
            *quality_summary(compressed),
        ]
    return "\n".join([*lines, END])


def _picture(name: str, text: str) -> str:
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="docs/figures/{name}-dark.svg">'
        f'<img alt="{text}" src="docs/figures/{name}-light.svg"></picture>'
    )


def _line(each: Measured) -> list[str]:
    base = each.rows.get(each.baseline or "")
    baseline = "" if base is None else f"{base['median_ms']:.3g} ms ({base['name']})"
    return [
        _title(each),
        baseline,
        _cell(each.rows.get("fastattn fp32")),
        _cell(fastest_ours(each), named=True),
        _cell(fastest_peer(each), named=True),
    ]


def _title(each: Measured) -> str:
    return f"{each.model.partition(',')[0]}: {workload_name(each.workload)}"


def _cell(row: Mapping[str, Any] | None, named: bool = False) -> str:
    """A ratio with its interval and its error; the reason where there is none: never one without parity."""
    if row is None:
        return ""
    if not _right(row):
        return str(row["reason"])
    ratio, name = row["ratio"], f"{row['name']} " if named else ""
    interval = f"({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{name}**{ratio['value']:.2f}x** {interval}, error {row['parity']['relative_error']:.0e}"


def _right(row: Mapping[str, Any]) -> bool:
    return bool(row["ratio"] and row["parity"] and row["parity"]["passed"])


def fastest_ours(each: Measured) -> dict[str, Any] | None:
    """Our row of the largest ratio, in whatever precision."""
    return _fastest([row for row in each.rows.values() if row["highlight"]])


def fastest_peer(each: Measured) -> dict[str, Any] | None:
    """The row of the largest ratio that is not ours; the untouched model counts in lower precision."""
    return _fastest(
        [row for row in each.rows.values() if not row["highlight"] and row["name"] not in UNTOUCHED]
    )


def _fastest(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    return max(filter(_right, rows), key=lambda row: row["ratio"]["value"], default=None)


def _machines(documents: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a machine and set of versions, with the days it was measured on."""
    days: dict[str, set[str]] = {}
    for document in documents:
        environment = (document.get("sweep") or document)["environment"]
        packages, cpu = environment["packages"], environment["cpu"]
        results = [run["result"] for run in document.get("runs", [])]
        device = results[0]["settings"]["device"] if results else "cpu"
        gpu = environment["gpu"] if device != "cpu" else None
        flags = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in cpu["flags"] and gpu is None]
        machine = gpu["name"] if gpu else f"{cpu['model']}, {cpu['torch_threads']} threads"
        versions = [f"{name} {packages[name]}" for name in ("torch", "transformers", "onnxruntime")]
        line = f"{', '.join([machine, *flags])}; {', '.join(versions)}"
        days.setdefault(line, set()).add(environment["date_utc"][:10])
    return [f"Measured on {line}; {', '.join(sorted(found))}." for line, found in days.items()]


def figures_page(documents: Sequence[Mapping[str, Any]], has_plots: bool) -> str:
    """docs/figures.md: every row of every result."""
    lines = ["# Figures", "", "Written by `make figures` from `benchmarks/results/`; never by hand.", ""]
    if has_plots:
        for name, text in (("speed-ups", "Speed-ups"), ("latency", "Latency")):
            lines += [_picture(name, text).replace("docs/figures/", "figures/"), ""]
    for document in documents:
        if document["schema"] == QUALITY:
            lines += [*_machines([document]), "", *quality_lines(document)]
            continue
        lines += [*_machines([document]), "", f"Reproduce with `{document['command']}`.", ""]
        if document["schema"] == FAMILIES:
            lines += [*_families(document), ""]
            continue
        for run in document["runs"]:
            lines += [f"## {run['title']}", ""]
            for each in measured({**document, "runs": [run]}):
                lines += [f"### {workload_name(each.workload)}", ""]
                lines += [f"Ratios are over {each.baseline}.", ""] if each.baseline else []
                lines += [*markdown_table(*workload_table(each)), ""]
            lines += _promises(run.get("promises", []))
            lines += _other_figures(run.get("figures", []))
    return "\n".join(lines).rstrip() + "\n"


def _families(document: Mapping[str, Any]) -> list[str]:
    """One line a run and contender of ours or others, over the run's baseline."""
    cells = []
    for each in measured(document):
        for row in each.rows.values():
            if row["name"] != each.baseline:
                time = "" if row["median_ms"] is None else f"{row['median_ms']:.3g} ms"
                cells.append([each.model, each.baseline or "", row["name"], time, _cell(row)])
    columns = ["run", "baseline", "contender", "median", "over the baseline"]
    return [
        f"## {document['name']}",
        "",
        *markdown_table(columns, cells),
        "",
        *_other_figures(document.get("figures", [])),
    ]


def _promises(promises: Sequence[Mapping[str, Any]]) -> list[str]:
    if not promises:
        return []
    cells = []
    for each in promises:
        ratio = each["ratio"]
        found = (
            f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})" if ratio else each["reason"]
        )
        wanted = f"{each['at_least']}x" + (" (lower end)" if each["bound"] == "low" else "")
        held = "yes" if each["holds"] else "**no**"
        cells.append([str(each["workload"]), each["contender"], each["over"], wanted, found, held])
    columns = ["workload", "contender", "over", "promised", "measured", "holds"]
    return ["### What is promised", "", *markdown_table(columns, cells), ""]


def _other_figures(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is no time: quality and size, each with its limit."""
    if not figures:
        return []
    cells = [
        [str(each["figure"]), f"{each['measured']:.5g}", "yes" if each["holds"] else "**no**"]
        for each in figures
    ]
    return ["### Quality and size", "", *markdown_table(["figure", "measured", "holds"], cells), ""]


def plots(documents: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The SVG of every plot by file name; none without a suite."""
    found = entries(documents)
    candles = [
        Candle(_title(each), what, row["ratio"]["value"], row["ratio"]["low"], row["ratio"]["high"])
        for each in found
        for what, row in (
            ("fastattn fp32", each.rows.get("fastattn fp32")),
            ("fastest of fastattn", fastest_ours(each)),
            ("fastest other", fastest_peer(each)),
        )
        if row is not None and _right(row)
    ]
    panels = _panels(found)
    if not candles or not panels:
        return {}
    drawn = {f"speed-ups-{theme}.svg": draw_speed_ups(candles, theme) for theme in THEMES}
    return drawn | {f"latency-{theme}.svg": draw_latency(panels, theme) for theme in THEMES}


def _panels(found: Sequence[Measured]) -> list[Panel]:
    """A panel a model: of its workloads the one that most contenders ran."""
    models = dict.fromkeys(each.model for each in found)
    panels = []
    for model in models:
        each = max(
            (each for each in found if each.model == model),
            key=lambda each: sum(map(_right, each.rows.values())),
        )
        timed = sorted(
            (row for row in each.rows.values() if _right(row) or row["name"] == each.baseline),
            key=lambda row: row["median_ms"],
        )
        shown = [row for index, row in enumerate(timed) if index < PANEL_BARS or row["name"] == each.baseline]
        bars = [
            TimeBar(
                row["name"],
                row["median_ms"],
                row["min_ms"],
                percentiles(row["wall_ms"])[90],
                row["highlight"],
            )
            for row in shown
        ]
        panels.append(Panel(_title(each), tuple(bars)))
    return panels


def renewed(readme: str, block: str) -> str:
    """The README's text with a fresh block.

    Raises:
        StaleError: the README does not have each marker once, in order.
    """
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise StaleError(f"the README must have {BEGIN} and, after it, {END}, once each")
    before, _, rest = readme.partition(BEGIN)
    return before + block + rest.partition(END)[2]


def outputs(root: Path, results: Path) -> dict[Path, str]:
    """Every file and what it should hold."""
    documents = load(results)
    drawn = plots(documents)
    readme = root / "README.md"
    text = renewed(readme.read_text(encoding="utf-8"), readme_block(documents, bool(drawn)))
    files = {readme: text, root / "docs" / "figures.md": figures_page(documents, bool(drawn))}
    return files | {root / "docs" / "figures" / name: svg for name, svg in drawn.items()}


def stale(files: Mapping[Path, str], plot_folder: Path) -> list[str]:
    """What is out of date: missing, different, or a plot that no result asks for any more."""
    found = []
    for path, wanted in files.items():
        if not path.is_file():
            found.append(f"{path.name} is missing")
            continue
        text = path.read_text(encoding="utf-8")
        if text == wanted:
            continue
        if path.suffix == ".svg" and drawn_by(text) != drawn_here():
            # Another version may draw the same plot in other bytes.
            found.append(f"{path.name} was drawn by {drawn_by(text)}, and here is {drawn_here()}")
        else:
            found.append(f"{path.name} disagrees with benchmarks/results")
    kept = {path.name for path in files}
    return found + [
        f"{path.name} is left over" for path in sorted(plot_folder.glob("*.svg")) if path.name not in kept
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing; fail where one is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the folder of README.md and docs/")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if find_spec("matplotlib") is None:
        print('the plots need matplotlib: pip install "fastattn[bench]"', file=sys.stderr)
        return 2
    files = outputs(args.root, args.results)
    folder = args.root / "docs" / "figures"
    if args.check:
        found = stale(files, folder)
        for each in found:
            print(each, file=sys.stderr)
        if found:
            print("run: make figures", file=sys.stderr)
        return 1 if found else 0
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in files.items():
        write_text(path, text)
    for path in folder.glob("*.svg"):
        if path not in files:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
