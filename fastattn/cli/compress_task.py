"""Two text files as what `fastattn compress` trains on and measures by: accuracy, perplexity or agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.contenders.source import copy_of, kind_of
from fastattn.cli import UserError
from fastattn.cli.texts import labelled_lines, paired_lines, text_lines
from fastattn.compress.sweep_batches import NO_LABEL, decoder_inputs

__all__ = ["TextTask"]

_BATCH = 32
# Rows that calibrate, drawn from the training's: more change neither scales nor importances much.
_CALIBRATION_ROWS = 128


@dataclass
class TextTask:
    """What a model is for, as far as two files of text tell.

    A classifier's score is the accuracy on its labels, a language model's the perplexity, an
    encoder-decoder's that of the targets, and an encoder's the mean cosine of its sentence embeddings (means
    over tokens) with the untouched model's.

    Attributes:
        metric: "accuracy", "perplexity" or "cosine".
        train_rows, evaluate_rows: mappings of lists, unpadded.
        tokenizer: pads them.
        reference: an encoder's embeddings of the evaluation rows before compression.
        moved: an encoder-decoder's decoder inputs, int64 [B, S], of such labels.
    """

    metric: str
    train_rows: list[dict[str, Any]]
    evaluate_rows: list[dict[str, Any]]
    tokenizer: Any
    reference: Tensor | None = None
    moved: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(cls, model: Any, tokenizer: Any, train: str, evaluate: str, seq: int) -> TextTask:
        """The task of a model.

        Raises:
            UserError: a file that cannot be read, labels that are not the model's, a model without a
                tokenizer, or one that is neither a classifier, a language model, an encoder of text nor an
                encoder-decoder that writes text.
        """
        kind = kind_of(model)
        if kind == "encoder-decoder" and model.get_output_embeddings() is None:
            raise UserError(
                f"{type(model).__name__} has no head that predicts a target; call fastattn.compress.sweep "
                "from Python"
            )
        if tokenizer is None or not hasattr(tokenizer, "pad"):
            raise UserError("--train and --evaluate need the model's tokenizer, and there is none beside it")
        if seq < 2:
            raise UserError(f"--seq is {seq}; it must be 2 tokens or more")
        rows = []
        for option, file in (("--train", train), ("--evaluate", evaluate)):
            if kind == "classifier":
                pairs = labelled_lines(option, file, model.config.num_labels)
                rows.append(
                    [
                        {**tokenizer(text, truncation=True, max_length=seq), "labels": label}
                        for text, label in pairs
                    ]
                )
            elif kind == "encoder-decoder":
                rows.append(_pairs(option, file, tokenizer, seq))
            elif kind == "decoder":
                rows.append(_windows(option, file, tokenizer, seq))
            else:
                texts = text_lines(option, file)
                rows.append([dict(tokenizer(text, truncation=True, max_length=seq)) for text in texts])
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        metric = {"classifier": "accuracy", "encoder": "cosine"}.get(kind, "perplexity")
        task = cls(metric, rows[0], rows[1], tokenizer)
        if kind == "encoder-decoder":
            task.moved = partial(decoder_inputs, model)
        if metric == "cosine":
            task.reference = task.embeddings(copy_of(model))
        return task

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "perplexity"

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """The score of a compressed model."""
        if self.metric == "cosine":
            assert self.reference is not None
            cosine = torch.cosine_similarity(self.embeddings(model), self.reference, dim=-1)
            return {"cosine": float(cosine.mean())}
        right, loss, count = 0, 0.0, 0
        with torch.inference_mode():
            for batch in self.batches(self.evaluate_rows, _BATCH):
                labels = batch.pop("labels")
                logits = model(**batch).logits
                if self.metric == "accuracy":
                    right += int((logits.argmax(-1) == labels).sum())
                    count += len(labels)
                else:
                    if self.moved is None:
                        # A language model's answer at a position is the token after it.
                        logits, labels = logits[:, :-1], labels[:, 1:]
                    logits, labels = logits.flatten(0, 1).float(), labels.flatten()
                    loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
                    count += int((labels != NO_LABEL).sum())
        if self.metric == "accuracy":
            return {"accuracy": right / count}
        return {"perplexity": math.exp(loss / count)}

    def embeddings(self, model: Any) -> Tensor:
        """Float32 [rows, N], means over real tokens."""
        found = []
        with torch.inference_mode():
            for batch in self.batches(self.evaluate_rows, _BATCH):
                states = model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"][..., None]
                found.append((states * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    def batches(self, rows: Sequence[dict[str, Any]], size: int) -> list[dict[str, Tensor]]:
        """Padded batches of consecutive rows, an encoder-decoder's with what its decoder reads."""
        found = []
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            names = [name for name in some[0] if name != "labels"]
            padded = [{name: row[name] for name in names} for row in some]
            batch = dict(self.tokenizer.pad(padded, return_tensors="pt"))
            if "labels" in some[0]:
                batch["labels"] = _stacked([row["labels"] for row in some])
            if self.moved is not None:
                batch["decoder_input_ids"] = self.moved(batch["labels"])
            found.append(batch)
        return found

    def calibration(self) -> list[dict[str, Tensor]]:
        """Some of the training rows."""
        step = max(1, len(self.train_rows) // _CALIBRATION_ROWS)
        found = self.batches(self.train_rows[::step][:_CALIBRATION_ROWS], _BATCH)
        if self.moved is not None:
            # What is learned from them is of real positions, which a decoder's padding is told from by this.
            for batch in found:
                batch["decoder_attention_mask"] = (batch["labels"] != NO_LABEL).long()
        return found

    def timed_batches(self, size: int) -> list[dict[str, Tensor]]:
        """One batch of evaluation rows at their own lengths, as they come."""
        batch = self.batches(self.evaluate_rows[:size], size)[0]
        batch.pop("labels", None)
        return [batch]


def _stacked(labels: Sequence[Any]) -> Tensor:
    """Numbers, int64 [B], or sequences of unequal length, int64 [B, S]."""
    if not isinstance(labels[0], list):
        return torch.tensor(labels)
    longest = max(map(len, labels))
    return torch.tensor([[*row, *[NO_LABEL] * (longest - len(row))] for row in labels])


def _pairs(option: str, file: str, tokenizer: Any, seq: int) -> list[dict[str, Any]]:
    """Sources as the encoder reads them, targets as labels; both cut to `seq` tokens."""
    cut = dict(truncation=True, max_length=seq)
    rows = []
    for source, target in paired_lines(option, file):
        row = tokenizer(source, text_target=target, **cut)
        rows.append({name: row[name] for name in ("input_ids", "attention_mask", "labels")})
    return rows


def _windows(option: str, file: str, tokenizer: Any, seq: int) -> list[dict[str, Any]]:
    """The whole text in windows of `seq` tokens, so that every row has what a next token depends on."""
    ids = tokenizer("\n".join(text_lines(option, file)))["input_ids"]
    rows = [ids[start : start + seq] for start in range(0, len(ids) - seq + 1, seq)]
    if not rows:
        raise UserError(f"{option} {file} has {len(ids)} tokens; a window takes {seq} (--seq)")
    return [{"input_ids": row, "attention_mask": [1] * seq, "labels": row} for row in rows]
