"""The demonstration's page and its terminal text: what was found, laid out for a reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from fastattn.bench.ratio import METHOD
from fastattn.bench.report import (
    Cell,
    Environment,
    Report,
    Section,
    Table,
    Text,
)
from fastattn.bench.report_sections import time_sections
from fastattn.bench.row_table import plain_cell, row_table
from fastattn.demo.result import Answer, DemoResult, described, headline
from fastattn.report import format_table

__all__ = ["answers_text", "page", "timing_text", "verify_text"]


def page(result: DemoResult) -> Report:
    """The report: timing first, then the question, then what was swapped and verified."""
    sections = [
        Text("The text", [described(result.text), _timed(result)]),
        *_timing(result),
        *_search(result),
        _swap(result.swap),
        _verify(result.verify),
        _batches(result.text),
        Text("How it was measured", [f"{METHOD[0].upper()}{METHOD[1:]}.", _PARITY]),
        Environment(result.environment),
    ]
    title = headline(result.model, result.environment, result.device)
    return Report(f"fastattn demo: {title}", result.summary(), sections)


_PARITY = (
    "Error: largest difference from the untouched model run in eager fp32, at real positions of all outputs "
    "and all timed batches, relative to the output's largest value, with the limit it is held to. A lower "
    "precision has a limit of its own: twice what the untouched model loses in it, plus 2 eps. A contender "
    "beyond its limit is not timed."
)


def _timed(result: DemoResult) -> str:
    timed, batches = result.text["timed_batches"], len(result.text["batches"])
    which = (
        f"all {batches} batches" if timed == batches else f"{timed} of the {batches} batches, from the first"
    )
    return (
        f"One timed call runs over {which}; the contenders take turns within each round, in one process. The "
        "search uses the whole text."
    )


def _timing(result: DemoResult) -> list[Section]:
    return [Table("Times", *row_table(result.rows)), *time_sections(result.rows)]


def _search(result: DemoResult) -> list[Section]:
    intro = Text(
        "One real question",
        [
            f"“{result.query}”",
            "The nearest sentences by cosine similarity of the embeddings, which are the mean of the last "
            "hidden state over real positions, normalized, as the model's own configuration says.",
        ],
    )
    untouched, *others = result.answers
    columns = ["similarity", *(answer.name for answer in others), "sentence"]
    rows: list[list[str | Cell | None]] = []
    for rank, hit in enumerate(untouched.hits):
        cells = [_rank(answer, rank, hit.index) for answer in others]
        rows.append([f"{hit.similarity:.4f}", *cells, hit.sentence])
    note = (
        f"Similarity as the untouched model ({untouched.name}) has it; beside it what the others have at the "
        "same rank, or the rank at which they have the sentence."
    )
    return [intro, Table("", columns, rows, note)]


def _rank(answer: Answer, rank: int, index: int) -> Cell:
    if answer.hits[rank].index == index:
        return Cell(f"{answer.hits[rank].similarity:.4f}", "good")
    places = [place for place, hit in enumerate(answer.hits, start=1) if hit.index == index]
    tone = "muted" if answer.lower_precision else "bad"
    return Cell(f"rank {places[0]}" if places else "not among them", tone)


def _swap(swap: Any) -> Table:
    counts = Counter((site["kind"], site["status"], site["reason"]) for site in swap["sites"])
    rows = [
        [kind, count, f"{status}: {reason}" if reason else status]
        for (kind, status, reason), count in counts.items()
    ]
    return Table("What was swapped", ["kind", "layers", "status"], rows, note=" ".join(swap["notes"]))


def _verify(verify: Any) -> Table:
    rows = [
        [
            each["case"],
            each["output"],
            f"{each['error']:.1e}",
            f"{each['tolerance']:.0e}",
            Cell("same" if each["passed"] else "differs", "good" if each["passed"] else "bad"),
        ]
        for each in verify["results"]
    ]
    note = "The swapped model against the untouched one on difficult batches; errors relative to scale."
    return Table("Verification", ["case", "output", "error", "limit", ""], rows, note)


def _batches(text: Any) -> Table:
    rows = [
        [
            number,
            each["sentences"],
            each["length"],
            each["tokens"],
            f"{each['tokens'] / each['positions']:.0%}",
        ]
        for number, each in enumerate(text["batches"], start=1)
    ]
    return Table("The batches", ["batch", "sentences", "padded length", "real tokens", "fill"], rows)


def timing_text(result: DemoResult) -> str:
    """The table of times for a terminal."""
    columns, cells = row_table(result.rows)
    return format_table(columns, [[plain_cell(cell) for cell in line] for line in cells])


def verify_text(verify: Any) -> str:
    """One line: how many comparisons were made and how close they came."""
    results: Sequence[Any] = verify["results"]
    failed = [each for each in results if not each["passed"]]
    if failed:
        names = ", ".join(f"{each['case']}: {each['output']}" for each in failed)
        return f"{len(failed)} of {len(results)} comparisons with the untouched model differ: {names}"
    worst = max(results, key=lambda each: each["error"])
    return (
        f"{len(results)} comparisons with the untouched model, all within their limit; the largest error is "
        f"{worst['error']:.1e} of the output's scale ({worst['case']}: {worst['output']})"
    )


def answers_text(result: DemoResult) -> str:
    """The question and its answers for a terminal, the untouched model's in full."""
    lines = [f"Question: {result.query}"]
    lines += [f"  {hit.similarity:.4f}  {hit.sentence}" for hit in result.answers[0].hits]
    return "\n".join(lines)
