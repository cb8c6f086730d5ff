"""Which pieces of a tokenizer a corpus needs, and the same tokenizer with these alone: works on the contents
of `tokenizer.json`, as `tokenizers.Tokenizer.to_str` gives them.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

__all__ = ["KINDS", "added_ids", "lost_text", "pieces", "remapped", "required_ids"]

State = dict[str, Any]

# Text that the corpus lacks must not become unknown over a letter or a digit.
_ALWAYS = frozenset(string.printable) - frozenset(string.whitespace)


def pieces(state: State) -> dict[str, int]:
    """The vocabulary: every piece with its id, the added tokens included."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in state["added_tokens"]}}


def added_ids(state: State) -> set[int]:
    """Special tokens, and those added to the vocabulary that was trained."""
    return {token["id"] for token in state["added_tokens"]}


def required_ids(state: State, used: Iterable[int], unknown_words: Iterable[str]) -> set[int]:
    """The ids without which text would be split in another way, or have no way to be split.

    Args:
        state: the tokenizer.
        used: ids that the corpus has, or that are to be kept.
        unknown_words: the corpus's words, as the tokenizer's pre-tokenizer gives them, that may come out as
            unknown.

    Returns:
        `used`, all added tokens, and what the kind of tokenizer needs: see the functions of `KINDS`.
    """
    held = pieces(state)
    names = {index: piece for piece, index in held.items()}
    kept = {names[index] for index in used} | {names[index] for index in added_ids(state)}
    unknown = state["model"].get("unk_token")
    if unknown in held:
        kept.add(unknown)
    return {held[piece] for piece in KINDS[state["model"]["type"]](state, held, kept, unknown_words)}


def _word_level(state: State, held: Mapping[str, int], kept: set[str], words: Iterable[str]) -> set[str]:
    return kept


def _word_piece(state: State, held: Mapping[str, int], kept: set[str], words: Iterable[str]) -> set[str]:
    """Also single characters, alone and inside a word, and what the search passes in words it gives up.

    The search takes the longest piece at every position, so it takes the same one of fewer pieces as long as
    that is there. A word it gives up is unknown for the pieces it took until then: without them it would
    take shorter ones, and might get through.
    """
    prefix = state["model"]["continuing_subword_prefix"]
    characters = _ALWAYS | {character for piece in kept for character in piece.removeprefix(prefix)}
    kept = kept | {piece for one in characters for piece in (one, prefix + one) if piece in held}
    for word in words:
        start = 0
        while start < len(word):
            ends = range(len(word), start, -1)
            found = ((prefix if start else "") + word[start:end] for end in ends)
            piece = next((piece for piece in found if piece in held), None)
            if piece is None:
                break
            kept.add(piece)
            start += len(piece) - (len(prefix) if start else 0)
    return kept


def _bpe(state: State, held: Mapping[str, int], kept: set[str], words: Iterable[str]) -> set[str]:
    """Also what the merges make on the way to a piece, single characters, and all bytes.

    Merges apply in one fixed order, the first that applies first; with fewer merges the same ones apply as
    long as these are there. Inside a word no merge crosses the border of a piece that is left at its end, so
    the piece on its own is made by the same merges.
    """
    model = state["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(map(_pair, model["merges"]))))}
    added = {token["content"] for token in state["added_tokens"]}
    characters = _ALWAYS | _byte_alphabet(state)
    result = set(kept)
    for piece in kept - added:
        symbols = _symbols(piece, prefix, suffix)
        result.update(symbol for symbol in symbols if symbol in held)
        while len(symbols) > 1:
            pairs = pairwise(symbols)
            rank, place = min((ranks.get(pair, len(ranks)), place) for place, pair in enumerate(pairs))
            if rank == len(ranks):
                break
            symbols[place : place + 2] = [symbols[place] + symbols[place + 1].removeprefix(prefix)]
            result.add(symbols[place])
    variants = ("{}", prefix + "{}", "{}" + suffix)
    result |= {form.format(one) for one in characters for form in variants if form.format(one) in held}
    return result | _byte_pieces(model, held)


def _unigram(state: State, held: Mapping[str, int], kept: set[str], words: Iterable[str]) -> set[str]:
    """Also single characters, all bytes, and one piece of the lowest score.

    The best split of a text is the best of fewer pieces, too, as long as its own are there. But whether a
    character counts as unknown goes by whether it is a piece, and what that costs by the lowest score there
    is (`tokenizers`: that score - 10).
    """
    model = state["model"]
    characters = _ALWAYS | {character for piece in kept for character in piece}
    worst = min(model["vocab"], key=lambda entry: entry[1])[0]
    unknown = [] if model["unk_id"] is None else [model["vocab"][model["unk_id"]][0]]
    single = {character for character in characters if character in held}
    return kept | single | {worst, *unknown} | _byte_pieces(model, held)


KINDS: dict[str, Callable[[State, Mapping[str, int], set[str], Iterable[str]], set[str]]] = {
    "BPE": _bpe,
    "Unigram": _unigram,
    "WordLevel": _word_level,
    "WordPiece": _word_piece,
}


def lost_text(state: State) -> str:
    """What becomes of text that the kept pieces do not cover, in words."""
    kind = state["model"]["type"]
    if kind == "WordLevel":
        return "words outside the corpus are unknown"
    if state["model"].get("byte_fallback") or (kind == "BPE" and _byte_alphabet(state)):
        return "words outside the corpus are split in smaller pieces, down to bytes"
    return (
        "words outside the corpus are split in smaller pieces, down to characters; characters that neither "
        "the corpus nor ASCII has are unknown"
    )


def remapped(state: State, ids: Mapping[int, int]) -> State:
    """The tokenizer with the pieces whose ids are in `ids` alone, under their new ids.

    Args:
        state: the tokenizer; left as it is.
        ids: old id -> new id, in the same order.
    """
    model = dict(state["model"])
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in ids]
        model["unk_id"] = None if model["unk_id"] is None else ids[model["unk_id"]]
        held = {piece for piece, _ in model["vocab"]}
    else:
        model["vocab"] = {piece: ids[index] for piece, index in model["vocab"].items() if index in ids}
        held = set(model["vocab"])
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            merge
            for merge in model["merges"]
            for left, right in [_pair(merge)]
            if left in held and right in held and left + right.removeprefix(prefix) in held
        ]
    result = {**state, "model": model}
    result["added_tokens"] = [{**token, "id": ids[token["id"]]} for token in state["added_tokens"]]
    if state.get("post_processor"):
        result["post_processor"] = _processor(state["post_processor"], ids)
    if state.get("padding"):
        padding = state["padding"]
        result["padding"] = {**padding, "pad_id": ids.get(padding["pad_id"], 0)}
    return result


def _processor(processor: State, ids: Mapping[int, int]) -> State:
    """A post-processor with the ids it writes around a text."""
    if processor["type"] == "Sequence":
        return {**processor, "processors": [_processor(one, ids) for one in processor["processors"]]}
    if processor["type"] == "TemplateProcessing":
        tokens = {
            name: {**token, "ids": [ids[index] for index in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return {**processor, "special_tokens": tokens}
    ends = [name for name in ("cls", "sep") if name in processor]
    return processor | {name: [processor[name][0], ids[processor[name][1]]] for name in ends}


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _symbols(piece: str, prefix: str, suffix: str) -> list[str]:
    """The characters a piece is merged from, as the tokenizer marks those inside and at the end of a word."""
    ends = bool(suffix) and piece.endswith(suffix) and piece != suffix
    continues = bool(prefix) and piece.startswith(prefix) and piece != prefix
    text = piece[len(prefix) if continues else 0 : len(piece) - (len(suffix) if ends else 0)]
    symbols = [(prefix if continues or place else "") + character for place, character in enumerate(text)]
    if ends:
        symbols[-1] += suffix
    return symbols


def _byte_alphabet(state: State) -> set[str]:
    """The characters that stand for bytes, where the tokenizer writes text so."""
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet()) if _has_byte_level(state.get("pre_tokenizer")) else set()


def _has_byte_level(part: State | None) -> bool:
    if part is None:
        return False
    return part["type"] == "ByteLevel" or any(map(_has_byte_level, part.get("pretokenizers", ())))


def _byte_pieces(model: State, held: Mapping[str, int]) -> set[str]:
    """<0x00> to <0xFF>, which stand for characters that are no pieces: all of them, or none is used."""
    return {f"<0x{byte:02X}>" for byte in range(256)} & held.keys() if model.get("byte_fallback") else set()
