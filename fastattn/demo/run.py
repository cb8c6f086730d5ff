"""The demonstration from loading to the report: what `fastattn demo` does."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastattn.bench.contenders import Models, copy_of, label
from fastattn.bench.environment import capture_environment
from fastattn.bench.files import write_text
from fastattn.bench.report import require_plotly
from fastattn.cli import UserError
from fastattn.cli.models import load_model
from fastattn.demo.page import answers_text, page, timing_text, verify_text
from fastattn.demo.result import Answer, DemoResult, described, headline
from fastattn.demo.search import check_pooling, embed, nearest
from fastattn.demo.texts import BATCH_SIZE, fill_of, sentences, tokenized_batches
from fastattn.demo.timing import Timing, time_contenders
from fastattn.swap import optimize
from fastattn.verification import VerificationError, verify

__all__ = ["run_demo"]

UNTOUCHED = label("eager", "fp32")
_STAGES = ("loading", "swapping", "verifying", "timing", "searching", "writing")

Show = Callable[[str], None]


def run_demo(
    output: str | Path, *, query: str, device: str = "cpu", budget_s: float = 45.0, show: Show | None = None
) -> DemoResult:
    """Swap, verify, time and export the pretrained MiniLM on real sentences, and answer a question with it.

    Args:
        output: folder for report.html and report.json; made if it does not exist.
        query: what to look for among the sentences.
        device: "cpu" or "cuda".
        budget_s: seconds of timing, on top of loading, compiling, exporting and searching.
        show: called with each part of the text as it is known; None shows nothing.

    Raises:
        UserError: a package or the device is missing, or the query is empty.
        OSError: `output` cannot be written.
    """
    show = show or (lambda text: None)
    if not query.strip():
        raise UserError("the query is empty")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device is cuda, and torch sees no CUDA or ROCm device; use --device cpu")
    require_plotly()
    folder = Path(output)
    _check_output(folder)

    with tqdm(total=len(_STAGES), disable=None, unit="step", leave=False) as bar:

        def stage(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update(_STAGES.index(name) - bar.n)

        stage("loading")
        model, tokenizer = load_model("minilm")
        check_pooling(model.config.name_or_path)
        model.to(device)
        texts = sentences()
        batches = tokenized_batches(tokenizer, texts, device=device)
        untouched = copy_of(model)
        described_model = {
            "name": "all-MiniLM-L6-v2",
            "class": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
        text, environment = _text(texts, batches), capture_environment()
        show(headline(described_model, environment, device))
        show(described(text))

        stage("swapping")
        swapped = optimize(model)
        show(swapped.table())

        stage("verifying")
        try:
            verified = verify(model).to_dict()
        except VerificationError as error:
            verified = error.report.to_dict()
        show(verify_text(verified))

        stage("timing")
        timing = time_contenders(
            Models(model, untouched),
            batches,
            device=device,
            budget_s=budget_s,
            progress=True,
        )
        with timing.resources:
            stage("searching")
            asked = tokenized_batches(tokenizer, [query], device=device)
            answers = _answers(timing, [*batches, *asked], texts)
        result = DemoResult(
            model=described_model,
            text={**text, "timed_batches": timing.timed},
            swap=swapped.to_dict(),
            verify=verified,
            rows=timing.rows,
            query=query,
            answers=answers,
            environment=environment,
            device=device,
        )
        show(timing_text(result))
        show(answers_text(result))
        show("\n".join(result.summary()))

        stage("writing")
        folder.mkdir(parents=True, exist_ok=True)
        page(result).write(folder / "report.html")
        write_text(folder / "report.json", json.dumps(result.to_dict(), indent=1, allow_nan=False) + "\n")
    return result


def _check_output(folder: Path) -> None:
    """Raise UserError where the reports could not be written; nothing is made yet, and no work done."""
    for name in ("report.html", "report.json"):
        if (folder / name).is_dir():
            raise UserError(f"--output {folder} holds a folder named {name}")
    place = folder
    while not place.exists() and place.parent != place:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"--output {folder} cannot be a folder: {place} is a file")
    if not os.access(place, os.W_OK):
        raise UserError(f"--output {folder} cannot be written: no permission in {place}")


def _text(texts: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    words = [len(sentence.split()) for sentence in texts]
    masks = [batch["attention_mask"] for batch in batches]
    return {
        "sentences": len(texts),
        "shortest_words": min(words),
        "longest_words": max(words),
        "batch_size": BATCH_SIZE,
        "batches": [
            {
                "sentences": len(mask),
                "length": mask.shape[1],
                "positions": mask.numel(),
                "tokens": int(mask.sum()),
            }
            for mask in masks
        ],
        "fill": fill_of(batches),
    }


def _answers(timing: Timing, batches: Sequence[Mapping[str, Tensor]], texts: Sequence[str]) -> list[Answer]:
    """The nearest sentences to the last batch's one text: the untouched model's, then each of ours."""
    rows = {row.name: row for row in timing.rows}
    names = [UNTOUCHED] + [row.name for row in timing.rows if row.highlight and row.status == "measured"]
    answers: list[Answer] = []
    expected: Tensor | None = None
    for name in names:
        rows_of_embeddings = embed(timing.forwards[name], batches)
        query, found = rows_of_embeddings[-1], rows_of_embeddings[:-1]
        similarities = found @ query
        if expected is None:
            expected = similarities
        change = float((similarities - expected).abs().max())
        answers.append(Answer(name, nearest(query, found, texts), change, rows[name].dtype != "fp32"))
    return answers
