"""Feed-forward neurons: which go first, and taking them out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastattn.compress.pruning.structure import FeedForwardSite
from fastattn.compress.pruning.surgery import shrink

__all__ = ["check_neurons", "choose_neurons", "remove_neurons"]


def check_neurons(site: FeedForwardSite, removed: Sequence[int]) -> None:
    """Raise a ValueError where the neurons `removed` are not those of `site`, or are all of them."""
    chosen = set(removed)
    wrong = [neuron for neuron in chosen if not 0 <= neuron < site.width]
    if wrong or len(chosen) != len(removed):
        raise ValueError(
            f"neurons of {site.name!r} are numbered 0 to {site.width - 1}, each at most once; got "
            f"{sorted(wrong)[:8] or 'some of them twice'}"
        )
    if len(chosen) == site.width:
        raise ValueError(f"{site.name!r} must keep at least one of its {site.width} neurons")
    if site.removable(len(chosen)) != len(chosen):
        raise ValueError(
            f"{site.name!r} must keep a multiple of {site.multiple} of its {site.width} neurons, not "
            f"{site.width - len(chosen)}"
        )


def choose_neurons(count: int, scores: Tensor) -> tuple[int, ...]:
    """The `count` neurons of least importance by `scores` [neurons]."""
    return tuple(sorted(scores.argsort(stable=True)[:count].tolist()))


def remove_neurons(removed: Mapping[FeedForwardSite, Sequence[int]]) -> None:
    """Take neurons out of layers; each must pass `check_neurons`."""
    kept_parts = []
    for site, neurons in removed.items():
        gone = set(neurons)
        kept = [neuron for neuron in range(site.width) if neuron not in gone]
        kept_parts += [(part, kept) for part in site.parts]
    shrink(kept_parts)
    for site, neurons in removed.items():
        for attribute in site.attributes:
            setattr(site.module, attribute, site.width - len(neurons))
