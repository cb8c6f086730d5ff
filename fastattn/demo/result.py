"""What the demonstration found: plain values for JSON, and the sentences that sum it up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fastattn.bench.ratio import METHOD, paired_ratio
from fastattn.bench.rows import Row
from fastattn.demo.search import Hit, same_answer
from fastattn.demo.timing import FASTATTN, PADDED

__all__ = ["Answer", "DemoResult", "described", "headline"]

SCHEMA = "fastattn.demo/1"


def headline(model: Mapping[str, Any], environment: Mapping[str, Any], device: str) -> str:
    """What ran where."""
    gpu, cpu = environment.get("gpu") or {}, environment["cpu"]
    where = gpu.get("name") if device == "cuda" else f"{cpu['model']}, {cpu['torch_threads']} threads"
    return f"{model['name']} ({model['parameters'] / 1e6:.1f}M parameters) on {where}"


def described(text: Mapping[str, Any]) -> str:
    """One sentence on the text and how much of its batches is padding."""
    return (
        f"{text['sentences']} sentences of {text['shortest_words']} to {text['longest_words']} words, in "
        f"{len(text['batches'])} batches of up to {text['batch_size']} in file order: {text['fill']:.0%} of "
        "the positions hold a token, the rest is padding."
    )


@dataclass(frozen=True)
class Answer:
    """The nearest sentences to the query, found with one way of running the model.

    Attributes:
        name: the contender's.
        hits: best first.
        largest_change: largest difference from the untouched model's cosine similarity, over all sentences.
        lower_precision: whether it computes in less than fp32, so that close sentences may change places.
    """

    name: str
    hits: Sequence[Hit]
    largest_change: float
    lower_precision: bool


@dataclass(frozen=True)
class DemoResult:
    """Everything the demonstration shows.

    Attributes:
        model: "name", "class" and "parameters" (their number).
        text: "sentences", "shortest_words", "longest_words", "batch_size", "batches" (one mapping a batch),
            "fill" and "timed_batches".
        swap, verify: what `SwapReport.to_dict` and `VerificationReport.to_dict` give.
        rows: what was timed.
        query: the question asked.
        answers: one a way of running the model, the untouched model's first.
        environment: what `capture_environment` gives.
        device: "cpu" or "cuda".
    """

    model: Mapping[str, Any]
    text: Mapping[str, Any]
    swap: Mapping[str, Any]
    verify: Mapping[str, Any]
    rows: Sequence[Row]
    query: str
    answers: Sequence[Answer]
    environment: Mapping[str, Any]
    device: str

    @property
    def baseline(self) -> Row | None:
        """The faster untouched contender, which ratios are over."""
        return next((row for row in self.rows if row.baseline), None)

    @property
    def passed(self) -> bool:
        """Whether verification, every row's parity and every fp32 answer agree with the untouched model's."""
        ours = (row for row in self.rows if row.highlight or row.name == PADDED)
        if any(row.status == "wrong" for row in self.rows) or any(row.status == "failed" for row in ours):
            return False
        exact = [answer for answer in self.answers if not answer.lower_precision]
        return bool(self.verify["passed"]) and all(map(self.agrees, exact))

    def agrees(self, answer: Answer) -> bool:
        """Whether an answer names the same sentences in the same order as the untouched model's."""
        return same_answer(self.answers[0].hits, answer.hits)

    def summary(self) -> list[str]:
        """One sentence for each of our rows, then what the ratios are made of, then the answers."""
        return self._busy() + self._speeds() + self._parts() + self._answers()

    def _busy(self) -> list[str]:
        """A warning where other programs were running when the demonstration began."""
        load, cores = (self.environment["cpu"].get(name) for name in ("load_average", "usable_cores"))
        # One core's worth of work is the demonstration's own start.
        if load is None or cores is None or load <= 1 + cores / 4:
            return []
        return [
            f"The machine was busy (load average {load} on {cores} cores): a quiet machine shows other "
            "times, and other ratios."
        ]

    def _speeds(self) -> list[str]:
        base = self.baseline
        lines = []
        for row in self.rows:
            if base is None or not row.highlight or row.ratio is None or row.parity is None:
                continue
            times = f"{row.name} takes {row.median_ms:.4g} ms against {base.median_ms:.4g} ms for {base.name}"
            error = f"largest error {row.parity.relative_error:.1e} of the output's scale"
            lines.append(f"{times}, the faster untouched model: {row.ratio}, {error}.")
        return lines

    def _parts(self) -> list[str]:
        """What the ratios are made of: swapped layers, padding left out, precision."""
        rows = {row.name: row for row in self.rows if row.status == "measured"}
        lines = []
        layers = rows[PADDED].ratio if PADDED in rows else None
        if layers is not None and FASTATTN in rows:
            padding = paired_ratio(rows[PADDED].wall_ms, rows[FASTATTN].wall_ms, PADDED)
            lines.append(
                f"What {FASTATTN} is made of: the swapped layers alone, all padding computed, give {layers}; "
                f"leaving the padding out gives {padding}."
            )
        return lines + [
            f"What {row.name} is made of: {row.against_ratio} over the untouched model in its precision; the "
            "rest is the precision."
            for row in rows.values()
            if row.highlight and row.against_ratio is not None
        ]

    def _answers(self) -> list[str]:
        lines = []
        for answer in self.answers[1:]:
            if self.agrees(answer):
                verdict = "finds the same nearest sentences in the same order"
            elif answer.lower_precision:
                verdict = "finds close sentences in another order, as a lower precision may"
            else:
                verdict = "finds other sentences than the untouched model, which is wrong"
            change = f"no similarity changed by more than {answer.largest_change:.1e}"
            lines.append(f"{answer.name} {verdict}; {change}.")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON holds; "schema" names their layout."""
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            "model": dict(self.model),
            "device": self.device,
            "text": dict(self.text),
            "summary": self.summary(),
            "swap": dict(self.swap),
            "verify": dict(self.verify),
            "timing": {
                "method": METHOD,
                "baseline": self.baseline.name if self.baseline else None,
                "rows": [row.to_dict() for row in self.rows],
            },
            "search": {
                "query": self.query,
                "answers": [
                    {
                        "name": answer.name,
                        "same_as_untouched": self.agrees(answer),
                        "largest_change": answer.largest_change,
                        "nearest": [asdict(hit) for hit in answer.hits],
                    }
                    for answer in self.answers
                ],
            },
            "environment": dict(self.environment),
        }
