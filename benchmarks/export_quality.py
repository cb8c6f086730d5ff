"""What int8 costs on real weights: MiniLM's answers on real sentences, and the size of the file."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import fastattn
from fastattn.cli.models import load_model

__all__ = ["quality_figures"]

_BATCH = 64


def quality_figures(folder: Path) -> list[dict[str, Any]]:
    """Cosine of every real token's hidden state with fp32's, Spearman's correlation on the dev split of
    STS-B, and the size of the int8 file, each beside what is promised.
    """
    model, tokenizer = load_model("minilm")
    with open(Path(os.environ["FASTATTN_DATA"]) / "stsb" / "dev.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    texts = [text for row in rows for text in row[:2]]
    scores = [float(row[2]) for row in rows]
    calibration = [
        dict(tokenizer(texts[start : start + 8], padding=True, return_tensors="pt"))
        for start in range(0, 128, 8)
    ]
    figures = []
    states: dict[str, list[Any]] = {}
    for name, options in {
        "fp32": {"precision": "fp32"},
        "int8": {"precision": "int8"},
        "int8 static": {"precision": "int8", "calibration": calibration},
    }.items():
        out = folder / f"minilm-{name.replace(' ', '-')}"
        fastattn.export(model, out, verify=False, **options)
        states[name] = _encode(fastattn.load(out), tokenizer, texts)
    baseline = _correlation(states["fp32"], scores)
    for name in ("int8", "int8 static"):
        cosine = _mean_cosine(states["fp32"], states[name])
        figures.append(_figure(f"MiniLM {name}: mean cosine of a token with fp32", cosine, 0.9995, _at_least))
        loss = abs(_correlation(states[name], scores) - baseline)
        figures.append(_figure(f"MiniLM {name}: change of Spearman on STS-B dev", loss, 0.003, _at_most))
    base: Any = load_model("bert-base-random")[0]
    sizes = {}
    for precision in ("fp32", "int8"):
        out = folder / f"bert-{precision}"
        if not out.exists():
            fastattn.export(base, out, precision=precision, verify=False)
        sizes[precision] = sum(each.stat().st_size for each in out.glob("*.onnx*"))
    figures.append(_figure("BERT-base int8: size, of fp32's", sizes["int8"] / sizes["fp32"], 0.26, _at_most))
    return figures


def _at_least(value: float, bound: float) -> bool:
    return value >= bound


def _at_most(value: float, bound: float) -> bool:
    return value <= bound


def _figure(name: str, value: float, bound: float, holds: Callable[[float, float], bool]) -> dict[str, Any]:
    sign = ">=" if holds is _at_least else "<="
    return {
        "figure": name,
        "promised": f"{sign} {bound}",
        "measured": float(f"{value:.5g}"),
        "holds": holds(value, bound),
    }


def _encode(model: Any, tokenizer: Any, texts: list[str]) -> list[Any]:
    """The hidden states of every text's real tokens, float32 [tokens, hidden]."""
    states = []
    for start in range(0, len(texts), _BATCH):
        batch = dict(tokenizer(texts[start : start + _BATCH], padding=True, return_tensors="pt"))
        hidden = torch.as_tensor(model(**batch)["last_hidden_state"])
        states += [
            row[mask.bool()].numpy() for row, mask in zip(hidden, batch["attention_mask"], strict=True)
        ]
    return states


def _mean_cosine(expected: list[Any], found: list[Any]) -> float:
    a, b = np.concatenate(expected), np.concatenate(found)
    return float(np.mean((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)))


def _correlation(states: list[Any], scores: list[float]) -> float:
    sentences = np.stack([tokens.mean(0) for tokens in states])
    sentences /= np.linalg.norm(sentences, axis=-1, keepdims=True)
    similarity = (sentences[0::2] * sentences[1::2]).sum(-1)
    return float(spearmanr(similarity, scores).statistic)
