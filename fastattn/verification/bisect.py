"""Which swapped layer is wrong where looking at layers from outside would make the error vanish."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from fastattn.layers import FusedLayer
from fastattn.swap import unfuse
from fastattn.verification.state import shared_copy

__all__ = ["first_site"]

Passes = Callable[[nn.Module], bool]


def first_site(model: nn.Module, passes: Passes) -> str:
    """A clause that names the site an error comes from which appears only without hooks on the layers.

    Works on copies: sites are put back from the last to the first until the case passes, so that of several
    wrong ones the first is named.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, FusedLayer)]
    if not names:
        return "only without hooks on the layers; no layer is swapped"
    padded = shared_copy(model)
    regions = [name for name in names if getattr(padded.get_submodule(name), "fastattn_padding", None)]
    for name in regions:
        padded.get_submodule(name).__dict__["fastattn_padding"] = "padded"
    packing = bool(regions) and _tried(passes, padded)
    where = "in padding-free execution" if packing else "in fused execution"
    start = f"only without hooks on the layers, i.e. {where}"
    outermost = [name for name in names if not any(_inside(name, other) for other in names)]
    leaves = [name for name in names if not any(_inside(other, name) for other in names)]
    for sites, put_back in ((leaves, _put_back_class), (regions, unfuse), (outermost, unfuse)):
        site = _first_to_blame(model, sites, put_back, passes)
        if site is not None:
            return f"{start}; it passes once {site} is restored"
    return f"{start}; no restored layer makes it pass"


def _inside(name: str, outer: str) -> bool:
    return name != outer and (outer == "" or name.startswith(f"{outer}."))


def _first_to_blame(
    model: nn.Module, sites: Sequence[str], put_back: Callable[[nn.Module], None], passes: Passes
) -> str | None:
    """The site whose restoration, after all behind it, makes the case pass: found by halving."""

    def passes_from(first: int) -> bool:
        tried = shared_copy(model)
        for name in sites[first:]:
            put_back(tried.get_submodule(name))
        return _tried(passes, tried)

    if not sites or not passes_from(0):
        return None
    # Passing from `low` on, failing from `high` on.
    low, high = 0, len(sites)
    while high - low > 1:
        middle = (low + high) // 2
        if passes_from(middle):
            low = middle
        else:
            high = middle
    return sites[low]


def _put_back_class(module: nn.Module) -> None:
    """One layer alone, its surroundings and its config still swapped: `unfuse` would go on to the layers
    below, and give it an attention that cannot read a packed batch.
    """
    if isinstance(module, FusedLayer):
        module.__class__ = module.fastattn_original  # type: ignore[assignment]


def _tried(passes: Passes, model: nn.Module) -> bool:
    # A mix of swapped and restored layers may be unable to run at all.
    try:
        return passes(model)
    except Exception:
        return False
