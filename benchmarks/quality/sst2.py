"""SST-2: MiniLM fine-tuned, then quantized, pruned and recovered; accuracy, size and speed of each.

    FASTATTN_DATA=... python benchmarks/quality/sst2.py --output CHECKPOINTS [--train-only]

Writes benchmarks/results/quality-sst2.json. What is finished is in CHECKPOINTS and not done again.
"""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import torch
from fine_tuning import batches, fine_tune
from record import linear_share, loss, promise, record

from fastattn.cli.models import load_model
from fastattn.compress import recover, sweep

Rows = list[tuple[str, int]]

_BATCH, _RECOVERY_BATCH = 32, 128
# Batches of dev sentences, as they come, that are timed one after another.
_TIMED = 4
_CALIBRATION = 128
PRUNED, COMPOSED = "pruned to 2x", "half the layers, pruned"
_COMPOSED_LOSS = 1.5
# Three of six layers, each with 8 of 12 heads and 576 of 1536 neurons.
_HALF = {"layers": [1, 3, 5], "heads": 4, "ffn": 960, "importance": "taylor"}
_TO_2X = {"target_speedup": 2.0, "importance": "taylor"}
_POINTS: list[dict[str, Any]] = [
    {"name": "fused"},
    {"quantize": "int8"},
    {"quantize": "int8-weight"},
    *({"quantize": {"scheme": "int4-weight", "method": method}} for method in ("absmax", "hqq", "gptq")),
    {"export": "int8", "name": "ONNX int8"},
    {"prune": _TO_2X, "optimize": False, "name": PRUNED},
    {"prune": _TO_2X, "quantize": "int8", "name": f"{PRUNED}, int8"},
    {"prune": _TO_2X, "export": "int8", "name": f"{PRUNED}, ONNX int8"},
    {"prune": _HALF, "name": COMPOSED},
    {"prune": _HALF, "quantize": "int8", "name": f"{COMPOSED}, int8"},
    {"prune": _HALF, "export": "int8", "name": f"{COMPOSED}, ONNX int8"},
]
# Parts of a sentence that the teacher labels, for each sentence of the training set.
_PARTS = 6
_MASKED = 0.1


def read(split: str) -> Rows:
    """Sentences with 0 (bad) or 1 (good)."""
    lines = (Path(os.environ["FASTATTN_DATA"]) / "sst2" / f"{split}.tsv").read_text(encoding="utf-8")
    return [(text, int(label)) for text, label in (line.rsplit("\t", 1) for line in lines.splitlines())]


def accuracy(model: Any, tokenizer: Any, rows: Rows) -> float:
    """The percentage of `rows` that `model` labels right."""
    labels = torch.tensor([label for _, label in rows])
    with torch.inference_mode():
        logits = [model(**batch).logits for batch in batches(tokenizer, [text for text, _ in rows], _BATCH)]
    return 100 * float((torch.cat(logits).argmax(-1) == labels).float().mean())


def train_rows(tokenizer: Any) -> list[dict[str, Any]]:
    return [{**tokenizer(text, truncation=True), "labels": label} for text, label in read("train")]


def recovery_rows(tokenizer: Any) -> list[dict[str, Any]]:
    """The training sentences and, of each, some runs of words, a tenth of them masked (Tang et al. 2019,
    "Distilling Task-Specific Knowledge from BERT into Simple Neural Networks", section 3.3): without labels,
    for the teacher has an answer to anything.
    """
    drawn, texts = random.Random(0), []
    for text, _ in read("train"):
        words = text.split()
        texts.append(text)
        for _ in range(_PARTS if len(words) > 2 else 0):
            count = drawn.randint(max(2, len(words) // 4), len(words))
            start = drawn.randint(0, len(words) - count)
            part = words[start : start + count]
            texts.append(" ".join(tokenizer.mask_token if drawn.random() < _MASKED else x for x in part))
    return [dict(tokenizer(text, truncation=True)) for text in texts]


def train(folder: Path) -> None:
    """Fine-tune all-MiniLM-L6-v2 with a classification head."""
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    encoder, tokenizer = load_model("minilm")
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(encoder.config.name_or_path, num_labels=2)
    fine_tune(
        model, tokenizer, train_rows(tokenizer), DataCollatorWithPadding(tokenizer), folder,
        epochs=4, learning_rate=5e-5, batch_size=_BATCH,
    )  # fmt: skip


def compress(folder: Path, epochs: int) -> int:
    """Measure every point against the eager model; the exit status says whether promises are kept."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager").eval()
    dev = read("dev")
    timed = batches(tokenizer, [text for text, _ in dev], _BATCH)
    calibration = []
    for start in range(0, _CALIBRATION, _BATCH):
        some = read("train")[start : start + _BATCH]
        batch = batches(tokenizer, [text for text, _ in some], _BATCH)[0]
        calibration.append({**batch, "labels": torch.tensor([label for _, label in some])})

    def recovered(student: Any, teacher: Any, place: Path) -> None:
        # Half of all weights, and none of them pruned.
        student.get_input_embeddings().requires_grad_(False)
        report = recover(
            student, teacher, recovery_rows(tokenizer), output_dir=place, epochs=epochs, learning_rate=5e-4,
            batch_size=_RECOVERY_BATCH, tokenizer=tokenizer, precision="bf16",
        )  # fmt: skip
        print(report.table())

    result = sweep(
        model,
        lambda each: {"accuracy": accuracy(each, tokenizer, dev), **linear_share(each)},
        _POINTS,
        folder=folder / "sweep",
        recover=recovered,
        calibration=calibration,
        workload=timed[:: len(timed) // _TIMED][:_TIMED],
    )
    points = {point.name: point for point in result.points}
    composed = points[f"{COMPOSED}, ONNX int8"]
    return record(
        "sst2",
        result,
        [
            promise("int8: points of accuracy lost", loss(result, points["int8"]), 0.5),
            promise("int8: bytes of the linears", points["int8"].figures.get("linear_bytes_share"), 0.27),
            promise(
                "int4-weight: bytes of the linears",
                points["int4-weight method gptq"].figures.get("linear_bytes_share"),
                0.16,
            ),
            promise("pruned and recovered: points lost", loss(result, points[PRUNED]), 1.0),
            promise("pruned: times as fast", points[PRUNED].speed_up, 2.0, at_least=True),
            promise(f"{composed.name}, padding-free: points lost", loss(result, composed), _COMPOSED_LOSS),
            promise(f"{composed.name}, padding-free: times as fast", composed.speed_up, 10.0, at_least=True),
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder of the checkpoints")
    parser.add_argument("--train-only", action="store_true", help="fine-tune, and compress nothing")
    parser.add_argument("--epochs", type=int, default=3, help="of each recovery (default 3)")
    args = parser.parse_args()
    if not (args.output / "config.json").is_file():
        train(args.output)
    return 0 if args.train_only else compress(args.output, args.epochs)


if __name__ == "__main__":
    raise SystemExit(main())
