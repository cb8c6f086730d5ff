"""One configuration of a family as the registry-driven test runs it, and what the cases share.

The cases are public configurations shrunk, with what breaks implementations kept: head sizes that are no
power of two, grouped queries, windows shorter than the test's sequences, soft caps, sinks, partial rotary,
post-norm and pre-norm, relative buckets, gated MLPs, tied and factorized embeddings, layers of mixed types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PAD", "SPECIAL", "VOCABULARY", "FamilyCase", "decoder", "encoder"]

VOCABULARY = 97
PAD = 0


@dataclass(frozen=True)
class FamilyCase:
    """One configuration of a family, and what it must be able to do.

    Attributes:
        name: as docs/models.md shows it.
        family: the adapter's module in fastattn.models.
        config: name of the configuration class, and its `options`.
        base, heads: model classes; the first head is the language model's where there is one.
        swapped: layers that must be swapped in `base`, by kind, once the family has an adapter.
        dispatches: whether its attention asks transformers' attention interface.
        generates: whether the first head generates; `caches` are the cache implementations it takes.
        packs: whether padding is never computed (the encoder's, of encoder-decoders).
        left: whether left padding means something to it.
        positions: whether several sequences may come in one row, told apart by `position_ids`.
        compiles: why the untouched model itself is not one graph; empty where it is.
        reference: the implementation compared with; "eager" where the original's is right.
        recorded: why the original's own attentions are wrong; empty where they are right.
        matters: configuration changes that must change the output: a feature of which none does could be lost
            unseen.
        std: of the random weights; wide enough that attention is not uniform.
    """

    name: str
    family: str
    config: str
    options: Mapping[str, Any]
    base: str
    heads: tuple[str, ...]
    swapped: Mapping[str, int] | None = None
    dispatches: bool = True
    generates: bool = False
    caches: tuple[str, ...] = ("dynamic", "static")
    packs: bool = True
    left: bool = True
    positions: bool = False
    compiles: str = ""
    reference: str = "eager"
    recorded: str = ""
    matters: tuple[Mapping[str, Any], ...] = field(default=())
    std: float = 0.3

    @property
    def classes(self) -> tuple[str, ...]:
        return (self.base, *self.heads)


SPECIAL = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)


def encoder(name: str, family: str, prefix: str, options: Mapping[str, Any], *heads: str, **more: Any):
    return FamilyCase(
        name,
        family,
        f"{prefix}Config",
        options,
        f"{prefix}Model",
        tuple(prefix + head for head in heads),
        **more,
    )


def decoder(name: str, family: str, prefix: str, options: Mapping[str, Any], *heads: str, **more: Any):
    return encoder(name, family, prefix, options, *heads, **{"generates": True, "packs": False, **more})
