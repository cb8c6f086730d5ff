"""The demonstration's text: sentences of very different lengths, and the padded batches made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["BATCH_SIZE", "fill_of", "sentences", "tokenized_batches"]

BATCH_SIZE = 32


def sentences() -> list[str]:
    """The lines of sentences.txt in file order: subjects and lengths are mixed, as in a queue of requests."""
    text = files("fastattn.demo").joinpath("sentences.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


def tokenized_batches(
    tokenizer: Any, texts: Sequence[str], *, batch_size: int = BATCH_SIZE, device: str = "cpu"
) -> list[dict[str, Tensor]]:
    """Batches of consecutive texts, each padded to its own longest.

    Args:
        tokenizer: a transformers tokenizer.
        texts: strings, in the order they are to be batched.
        batch_size: texts a batch; the last batch may be smaller.
        device: where the tensors are put.

    Returns:
        one mapping a batch: `input_ids`, `attention_mask` and, for BERT, `token_type_ids`, each int64 [B, S].
    """
    groups = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    return [dict(tokenizer(group, padding=True, return_tensors="pt").to(device)) for group in groups]


def fill_of(batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Real tokens over all positions of the batches, in (0, 1]: what is not filled is padding."""
    real = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return real / sum(batch["attention_mask"].numel() for batch in batches)
