"""A vocabulary of what a corpus uses: the other rows of the embedding, and of the output head, go."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastattn.compress.configs import own_configs
from fastattn.compress.token_tables import find_tables, named_ids, rename_ids
from fastattn.compress.tokenizer_pieces import KINDS, added_ids, lost_text, pieces, remapped, required_ids
from fastattn.report import format_table

__all__ = ["VocabularyReport", "trim_vocabulary"]

# Texts encoded at a time: bounds the memory of a large corpus.
_CHUNK = 1024


@dataclass(frozen=True)
class VocabularyReport:
    """What `trim_vocabulary` kept, and how far it reaches.

    Attributes:
        kind: "WordPiece", "BPE", "Unigram" or "WordLevel".
        tokens_before, tokens_after: rows of the model's tables.
        used: tokens that occur in the corpus.
        named: special and added tokens, ids that the model's config names, and `keep`, where not used.
        fallback: the rest that is kept: pieces that others are merged from, single characters, bytes.
        parameters_before, parameters_after: of the whole model, tied ones once.
        bytes_before, bytes_after: the same in bytes.
        texts: texts of the corpus.
        corpus_tokens: tokens of the corpus, the added and special ones not counted.
        unknown: the share of them that is unknown to the tokenizer; the same before and after.
        unseen: the share of tokens of *other* text like the corpus that is expected to be split in smaller
            pieces, or to be unknown: tokens that occur once over all tokens (I. J. Good, "The population
            frequencies of species and the estimation of population parameters", Biometrika 40, 1953).
        tables: the names of the trimmed tensors.
        notes: what else a reader should know.
    """

    kind: str
    tokens_before: int
    tokens_after: int
    used: int
    named: int
    fallback: int
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    texts: int
    corpus_tokens: int
    unknown: float
    unseen: float
    tables: tuple[str, ...]
    notes: tuple[str, ...]

    def table(self) -> str:
        """Tokens, parameters and bytes before and after, then the notes."""
        rows = [
            (what, f"{before:,}", f"{after:,}", f"{after / before:.1%}")
            for what, before, after in (
                ("tokens", self.tokens_before, self.tokens_after),
                ("parameters", self.parameters_before, self.parameters_after),
                ("bytes", self.bytes_before, self.bytes_after),
            )
        ]
        return "\n".join([format_table(("", "before", "after", "kept"), rows), *self.notes])

    def to_dict(self) -> dict[str, Any]:
        """The same as plain values."""
        return asdict(self)


def trim_vocabulary(
    model: nn.Module, tokenizer: Any, texts: Iterable[str], keep: Sequence[str | int] = ()
) -> tuple[Any, VocabularyReport]:
    """Remove every token that `texts` do not use from `tokenizer` and, in place, from `model`.

    The texts are split in the same pieces as before, under new ids; the model's hidden states of them are
    bitwise the same. Other text is split in smaller pieces (characters; bytes where the tokenizer has them)
    or is unknown. A decoder generates over the tokens that are left. Ids that configs name (padding, end,
    decoder start, suppressed tokens ...) are renamed in copies of the configs that the model is given, and
    `save_pretrained` of model and tokenizer writes a folder that loads as it is.

    Args:
        model: a transformers model, or any module with an `nn.Embedding` that has a row for every token.
            Its parameters stay the same objects, of fewer rows; make their optimizer anew.
        tokenizer: its fast tokenizer (transformers), or a `tokenizers.Tokenizer`; WordPiece, BPE, Unigram or
            WordLevel. It is left as it is.
        texts: all that the model is to read, and to write: labels, prompts and chat templates included.
        keep: further tokens, by name ("##ing") or id.

    Returns:
        The trimmed tokenizer, of the same class, and the report.

    Raises:
        TypeError: the tokenizer has no `tokenizer.json` (a slow one), or `texts` is not texts.
        ValueError: no texts; `keep` names no token; model and tokenizer do not belong together; the tokenizer
            splits at random (BPE dropout); the trimmed tokenizer, once saved, splits the texts otherwise.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> words = {"[UNK]": 0, "a": 1, "red": 2, "green": 3, "apple": 4}
        >>> tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
        >>> model = torch.nn.Embedding(5, 8)
        >>> trimmed, report = trim_vocabulary(model, tokenizer, ["apple"], keep=["red"])
        >>> trimmed.get_vocab() == {"[UNK]": 0, "red": 1, "apple": 2}, model.weight.shape
        (True, torch.Size([3, 8]))
    """
    backend = _backend(tokenizer)
    texts = _checked(texts)
    state = json.loads(backend.to_str())
    kind = state["model"]["type"]
    if kind not in KINDS:
        raise ValueError(f"a tokenizer of kind {kind} cannot be trimmed; known are {', '.join(KINDS)}")
    if state["model"].get("dropout"):
        raise ValueError("the tokenizer drops merges at random (dropout): set it to None before trimming")
    held = pieces(state)
    asked = _asked(keep, held)
    tables = find_tables(model, max(held.values()))

    plain = _unpadded(backend)
    encoded = _encode(plain, texts)
    counts = np.bincount(np.concatenate(encoded), minlength=tables.rows)
    used = set(np.flatnonzero(counts).tolist())
    named = added_ids(state) | named_ids(model, tables.rows) | asked
    in_tokenizer = set(held.values())
    required = required_ids(
        state, (used | named) & in_tokenizer, _unknown_words(plain, state, texts, encoded)
    )
    kept = sorted(required | named)
    ids = {old: new for new, old in enumerate(kept)}

    trimmed = _rebuilt(tokenizer, remapped(state, ids))
    _verify(trimmed, texts, encoded, ids)

    before = _size(model)
    own_configs(model)
    rename_ids(model, tables.rows, ids)
    tables.keep(torch.tensor(kept))
    after = _size(model)
    content = counts.copy()
    content[sorted(added_ids(state) - _unknown_ids(state))] = 0
    total = max(1, int(content.sum()))
    unknown = sum(int(counts[index]) for index in _unknown_ids(state)) / total
    unseen = int((content == 1).sum()) / total
    notes = (
        f"{lost_text(state)}; of text like the corpus, {unseen:.2%} of the tokens are expected to be new",
        f"{unknown:.2%} of the corpus's tokens are unknown, as they were before",
    )
    return trimmed, VocabularyReport(
        kind=kind,
        tokens_before=tables.rows,
        tokens_after=len(kept),
        used=len(used),
        named=len(named - used),
        fallback=len(kept) - len(named | used),
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        texts=len(texts),
        corpus_tokens=int(content.sum()),
        unknown=unknown,
        unseen=unseen,
        tables=tuple(tables.entries),
        notes=notes,
    )


def _backend(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"{type(tokenizer).__name__} has no tokenizer.json to trim; give a fast tokenizer of "
            "transformers (AutoTokenizer with use_fast=True) or a tokenizers.Tokenizer"
        )
    return backend


def _checked(texts: Iterable[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts is one text; give a list of texts")
    texts = list(texts)
    wrong = next((text for text in texts if not isinstance(text, str)), None)
    if wrong is not None:
        raise TypeError(f"texts holds a {type(wrong).__name__}; every text must be a str")
    if not any(texts):
        raise ValueError("texts is empty; give the texts that the model is to read")
    return texts


def _asked(keep: Sequence[str | int], held: dict[str, int]) -> set[int]:
    if isinstance(keep, str):
        raise TypeError(f"keep is {keep!r}; give a list of tokens")
    ids = set(held.values())
    missing = [token for token in keep if token not in (held if isinstance(token, str) else ids)]
    if missing:
        raise ValueError(
            f"keep names {missing[0]!r}, which is no token of the tokenizer ({len(held)} tokens)"
        )
    return {held[token] if isinstance(token, str) else token for token in keep}


def _unpadded(backend: Any) -> Any:
    """A copy that neither cuts nor pads."""
    plain = copy.deepcopy(backend)
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = backend.encode_special_tokens
    return plain


def _encode(backend: Any, texts: list[str]) -> list[np.ndarray[Any, Any]]:
    """The ids of every text, with those the tokenizer writes around it."""
    return [
        np.asarray(encoding.ids, dtype=np.int64)
        for start in range(0, len(texts), _CHUNK)
        for encoding in backend.encode_batch(texts[start : start + _CHUNK])
    ]


def _unknown_ids(state: dict[str, Any]) -> set[int]:
    model = state["model"]
    if "unk_id" in model:
        return set() if model["unk_id"] is None else {model["unk_id"]}
    return {index for piece, index in pieces(state).items() if piece == model.get("unk_token")}


def _unknown_words(
    backend: Any, state: dict[str, Any], texts: list[str], encoded: list[np.ndarray[Any, Any]]
) -> set[str]:
    """The words, as the tokenizer's model is given them, of the texts that have an unknown token."""
    unknown = list(_unknown_ids(state))
    words: set[str] = set()
    for text, ids in zip(texts, encoded, strict=True):
        if np.isin(ids, unknown).any():
            if backend.normalizer is not None:
                text = backend.normalizer.normalize_str(text)
            split = (
                [(text, None)]
                if backend.pre_tokenizer is None
                else backend.pre_tokenizer.pre_tokenize_str(text)
            )
            words.update(word for word, _ in split)
    return words


def _rebuilt(tokenizer: Any, state: dict[str, Any]) -> Any:
    """The tokenizer as it loads from a folder that holds `state`, so that it is what a user loads later."""
    from tokenizers import Tokenizer

    text = json.dumps(state, ensure_ascii=False)
    if isinstance(tokenizer, Tokenizer):
        trimmed = Tokenizer.from_str(text)
        trimmed.encode_special_tokens = tokenizer.encode_special_tokens
        return trimmed
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(text, encoding="utf-8")
        trimmed = type(tokenizer).from_pretrained(folder, local_files_only=True)
    trimmed.name_or_path = tokenizer.name_or_path
    return trimmed


def _verify(
    tokenizer: Any, texts: list[str], encoded: list[np.ndarray[Any, Any]], ids: dict[int, int]
) -> None:
    """Raises ValueError for a text that is split in another way than before."""
    new_ids = np.full(max(ids) + 1, -1)
    new_ids[list(ids)] = list(ids.values())
    for text, old, new in zip(texts, encoded, _encode(_unpadded(_backend(tokenizer)), texts), strict=True):
        if not np.array_equal(new_ids[old], new):
            raise ValueError(
                f"{text[:80]!r} would be split in another way: this {type(tokenizer).__name__} does not save "
                "all that it splits by, or is not what its tokenizer.json says; nothing was changed"
            )


def _size(model: nn.Module) -> tuple[int, int]:
    """Parameters, and their bytes."""
    parameters = list(model.parameters())
    return (
        sum(parameter.numel() for parameter in parameters),
        sum(parameter.numel() * parameter.element_size() for parameter in parameters),
    )
