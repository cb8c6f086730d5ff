"""STS-B: the pretrained MiniLM quantized; Spearman's correlation with people's scores, size and speed.

    FASTATTN_DATA=... python benchmarks/quality/stsb.py --output FOLDER

Writes benchmarks/results/quality-stsb.json. What is finished is in FOLDER and not done again.
"""

from __future__ import annotations

import argparse
import csv
import os
from pathlib import Path
from typing import Any

import torch
from fine_tuning import batches
from record import linear_share, loss, promise, record
from scipy.stats import spearmanr

from fastattn.cli.models import load_model
from fastattn.compress import sweep

_BATCH = 64
# Batches of dev sentences, as they come, that are timed one after another.
_TIMED = 4
_CALIBRATION = 128
_POINTS: list[dict[str, Any]] = [
    {"name": "fused"},
    {"quantize": "int8"},
    {"quantize": "int8-weight"},
    *({"quantize": {"scheme": "int4-weight", "method": method}} for method in ("absmax", "hqq", "gptq")),
    {"export": "fp32", "name": "ONNX"},
    {"export": "int8", "name": "ONNX int8"},
]


def read(split: str) -> tuple[list[str], list[float]]:
    """The sentences, pair after pair, and a score a pair."""
    file = Path(os.environ["FASTATTN_DATA"]) / "stsb" / f"{split}.csv"
    with file.open(newline="", encoding="utf-8") as lines:
        rows = list(csv.reader(lines))
    return [text for row in rows for text in row[:2]], [float(row[2]) for row in rows]


def spearman(model: Any, tokenizer: Any, texts: list[str], scores: list[float]) -> float:
    """Of the scores with the cosine of a pair's embeddings, means over tokens (Reimers and Gurevych 2019)."""
    embeddings = []
    with torch.inference_mode():
        for batch in batches(tokenizer, texts, _BATCH):
            states = model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            embeddings.append((states * mask).sum(1) / mask.sum(1))
    found = torch.cat(embeddings)
    similarity = torch.cosine_similarity(found[0::2], found[1::2], dim=-1)
    return float(spearmanr(similarity.numpy(), scores).statistic)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the folder of what is finished")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_model("minilm")
    texts, scores = read("dev")
    timed = batches(tokenizer, texts, _BATCH)
    result = sweep(
        model,
        lambda each: {"spearman": spearman(each, tokenizer, texts, scores), **linear_share(each)},
        _POINTS,
        folder=args.output / "sweep",
        calibration=batches(tokenizer, read("train")[0][:_CALIBRATION], _BATCH),
        workload=timed[:: len(timed) // _TIMED][:_TIMED],
    )
    points = {point.name: point for point in result.points}
    promises = []
    for name in ("int8", "ONNX int8"):
        promises += [
            promise(f"{name}: Spearman lost", loss(result, points[name]), 0.003),
            promise(f"{name}: times as fast as SDPA fp32", points[name].speed_up, 3.0, at_least=True),
        ]
    return record("stsb", result, promises)


if __name__ == "__main__":
    raise SystemExit(main())
