"""Semantic search: embeddings as the model's own configuration defines them, and the nearest sentences."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Hit", "check_pooling", "embed", "nearest", "same_answer"]

# Two similarities closer than this are a tie: float32 rounding may order them either way.
TIE = 1e-5


@dataclass(frozen=True)
class Hit:
    """One sentence found: its index in the list searched, its cosine similarity to the query, its text."""

    index: int
    similarity: float
    sentence: str


def check_pooling(folder: str | Path) -> None:
    """Raise ValueError unless the sentence-transformers model in `folder` takes the mean and then normalizes.

    That is what `embed` does; the model says it in modules.json and 1_Pooling/config.json.
    """
    modules = json.loads((Path(folder) / "modules.json").read_text(encoding="utf-8"))
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    pooling = json.loads((Path(folder) / "1_Pooling" / "config.json").read_text(encoding="utf-8"))
    modes = [name for name, value in pooling.items() if name.startswith("pooling_mode") and value is True]
    if kinds != ["Transformer", "Pooling", "Normalize"] or modes != ["pooling_mode_mean_tokens"]:
        raise ValueError(
            f"{folder} is {' -> '.join(kinds)} with {', '.join(modes)}; needed are the mean and normalization"
        )


def embed(run: Callable[[Mapping[str, Tensor]], Any], batches: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Sentence embeddings: the mean of the last hidden state over real positions, scaled to length 1.

    Reimers and Gurevych, "Sentence-BERT" (2019), section 3.

    Args:
        run: takes a batch and returns an output with `last_hidden_state` [B, S, H], a tensor or an array.
        batches: tokenized batches with an `attention_mask`.

    Returns:
        float32 [number of sentences, H] on the CPU.
    """
    import torch
    from torch.nn.functional import normalize

    rows = []
    for batch in batches:
        hidden = torch.as_tensor(run(batch).last_hidden_state).float().cpu()
        mask = batch["attention_mask"].cpu().unsqueeze(-1)
        # By selection, not by multiplying with zero: whatever the padded positions hold is ignored.
        total = hidden.masked_fill(mask == 0, 0.0).sum(dim=1)
        rows.append(normalize(total / mask.sum(dim=1).clamp(min=1), dim=-1))
    return torch.cat(rows)


def nearest(query: Tensor, embeddings: Tensor, texts: Sequence[str], count: int = 5) -> list[Hit]:
    """The sentences most similar to a query, best first.

    Args:
        query: [H] or [1, H], of length 1.
        embeddings: [number of texts, H], rows of length 1.
        texts: what the rows stand for.
        count: how many to return.
    """
    best = (embeddings @ query.reshape(-1)).topk(min(count, len(texts)))
    return [
        Hit(index, similarity, texts[index])
        for similarity, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def same_answer(reference: Sequence[Hit], other: Sequence[Hit]) -> bool:
    """Whether both lists name the same sentences in the same order; sentences that tie may change places."""
    if len(reference) != len(other):
        return False
    return all(
        a.index == b.index or abs(a.similarity - b.similarity) <= TIE
        for a, b in zip(reference, other, strict=True)
    )
