"""Text files as arguments of a verb: one text a line, with a label or a target after a tab where one is
wanted.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastattn.cli import UserError

__all__ = ["labelled_lines", "new_folder", "paired_lines", "text_batches", "text_lines"]

# Texts of a batch for calibration.
_BATCH = 8


def text_lines(option: str, file: str) -> list[str]:
    """The texts of the file that `option` names.

    Raises:
        UserError: it cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {file} cannot be read: {error}") from error
    texts = [line for line in lines if line]
    if not texts:
        raise UserError(f"{option} {file} holds no text; one a line is read")
    return texts


def labelled_lines(option: str, file: str, num_labels: int) -> list[tuple[str, int]]:
    """Texts with their labels, from lines of a text, a tab and a label's number.

    Raises:
        UserError: as `text_lines`, or a line has no label from 0 to num_labels - 1.
    """
    found = []
    for number, line in enumerate(text_lines(option, file), start=1):
        text, _, label = line.rpartition("\t")
        if not text or not label.isdigit() or int(label) >= num_labels:
            raise UserError(
                f"{option} {file}: text {number} is {line[:60]!r}; a classifier's are a sentence, a tab and "
                f"a label from 0 to {num_labels - 1}"
            )
        found.append((text, int(label)))
    return found


def paired_lines(option: str, file: str) -> list[tuple[str, str]]:
    """Sources with their targets, from lines of a text, a tab and a text.

    Raises:
        UserError: as `text_lines`, or a line is not two texts with one tab between them.
    """
    found = []
    for number, line in enumerate(text_lines(option, file), start=1):
        source, _, target = (part.strip() for part in line.partition("\t"))
        if not source or not target or "\t" in target:
            raise UserError(
                f"{option} {file}: text {number} is {line[:60]!r}; an encoder-decoder's are a source, a tab "
                "and its target"
            )
        found.append((source, target))
    return found


def text_batches(option: str, texts: list[str], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """The texts as padded batches.

    Raises:
        UserError: the model has no tokenizer.
    """
    if tokenizer is None:
        raise UserError(f"{option} needs the model's tokenizer, and it has none; call fastattn from Python")
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(texts[start : start + _BATCH], padding=True, truncation=True, return_tensors="pt")
        yield dict(batch)


def new_folder(option: str, folder: str) -> Path:
    """Where a model is to be written, checked before it is made.

    Raises:
        UserError: it is a file, or holds anything.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{option} {folder} exists already; give a new or empty folder")
    return path
