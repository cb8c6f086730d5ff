"""Attention heads: which may go together, which go first, and taking them out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fastattn.compress.pruning.structure import AttentionSite
from fastattn.compress.pruning.surgery import shrink
from fastattn.layers import MultiheadAttention

__all__ = [
    "KeptSlopes",
    "check_heads",
    "choose_heads",
    "counts_that_fit",
    "kept_slopes",
    "remove_heads",
    "together",
]


def counts_that_fit(site: AttentionSite) -> list[int]:
    """How many heads may be removed of a layer, at least one of them staying: whole key heads with all that
    read them, or as many of every key head's query heads.
    """
    whole = range(0, site.num_heads, site.group)
    alike = range(0, site.num_heads, site.num_kv_heads)
    return sorted({*whole, *alike})


def check_heads(site: AttentionSite, removed: Sequence[int]) -> None:
    """Raise a ValueError where the heads `removed` are not heads of `site` or do not fit its key heads."""
    wrong = [head for head in removed if not 0 <= head < site.num_heads]
    if wrong or len(set(removed)) != len(removed):
        raise ValueError(
            f"heads of {site.name!r} are numbered 0 to {site.num_heads - 1}, each at most once; got "
            f"{list(removed)}"
        )
    if len(removed) == site.num_heads:
        raise ValueError(f"{site.name!r} must keep at least one of its {site.num_heads} heads")
    left = [site.group] * site.num_kv_heads
    for head in removed:
        left[head // site.group] -= 1
    if len({count for count in left if count}) > 1:
        raise ValueError(
            f"removing heads {sorted(removed)} of {site.name!r} breaks its grouped queries: its "
            f"{site.num_kv_heads} key heads, with {site.group} query heads each, must lose all of their "
            f"query heads or all the same number; they would keep {left}"
        )


def choose_heads(site: AttentionSite, count: int, scores: Tensor) -> tuple[int, ...]:
    """The `count` heads to remove of least importance by `scores` [heads], among those that may go together.

    `count` is one of `counts_that_fit(site)`.
    """
    by_group = scores.view(site.num_kv_heads, site.group)
    options: list[list[int]] = []
    if count % site.group == 0:
        groups = by_group.sum(dim=1).argsort(stable=True)[: count // site.group]
        options.append([g * site.group + each for g in groups.tolist() for each in range(site.group)])
    if count % site.num_kv_heads == 0:
        least = by_group.argsort(dim=1, stable=True)[:, : count // site.num_kv_heads].tolist()
        options.append([g * site.group + each for g, members in enumerate(least) for each in members])
    best = min(options, key=lambda removed: float(scores[removed].sum()))
    return tuple(sorted(best))


def together(sites: Iterable[AttentionSite]) -> list[list[AttentionSite]]:
    """The sites in groups that keep the same heads."""
    groups: dict[str, list[AttentionSite]] = {}
    for site in sites:
        groups.setdefault(f"linked {site.linked}" if site.linked else site.name, []).append(site)
    return list(groups.values())


def remove_heads(model: nn.Module, removed: Mapping[AttentionSite, Sequence[int]]) -> None:
    """Take heads out of layers of `model`; each must pass `check_heads`."""
    kept_parts = []
    for site, heads in removed.items():
        kept = [head for head in range(site.num_heads) if head not in set(heads)]
        groups = sorted({head // site.group for head in kept})
        kept_parts += [(part, groups if part.groups else kept) for part in site.parts]
    shrink(kept_parts)
    for site, heads in removed.items():
        kept = [head for head in range(site.num_heads) if head not in set(heads)]
        groups = sorted({head // site.group for head in kept})
        sizes = {
            "heads": len(kept),
            "kv_heads": len(groups),
            "group": len(kept) // len(groups),
            "width": len(kept) * site.head_dim,
        }
        for attribute, size in site.attributes.items():
            setattr(site.module, attribute, sizes[size])
        if site.alibi:
            KeptSlopes.of(site.module, site.num_heads).keep(kept)
        if isinstance(site.module, nn.MultiheadAttention):
            _compute_by_ours(site.module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(below, MultiheadAttention) and below.must_stay for below in module.modules()
        ):
            # Its nested tensors go to torch.nn's own attention, which knows one width.
            module.use_nested_tensor = False


def _compute_by_ours(attention: nn.MultiheadAttention) -> None:
    """torch.nn's forward takes as many features in as heads give; ours does not, and stays after restore."""
    attention.__class__ = MultiheadAttention
    # What torch.nn's encoder layer asks before it computes the attention itself.
    attention._qkv_same_embed_dim = False


class KeptSlopes:
    """A hook before an attention layer with ALiBi: of the biases that the model makes for all the heads there
    once were, those of the heads that are left.

    The model makes them for all layers at once, and layers keep different heads. In Falcon the mask has them
    added to it, and is cut, too.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.heads = list(range(total))

    @staticmethod
    def of(module: nn.Module, total: int) -> KeptSlopes:
        """The hook of `module`, put there if it is not."""
        hook = kept_slopes(module)
        if hook is None:
            hook = KeptSlopes(total)
            module.register_forward_pre_hook(hook, with_kwargs=True)
        return hook

    def keep(self, kept: Sequence[int]) -> None:
        """Of the heads left so far, keep those numbered `kept`."""
        self.heads = [self.heads[head] for head in kept]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if kwargs.get("alibi") is not None:
            alibi = kwargs["alibi"]
            # [B * heads, 1, S], or with the batch apart.
            by_head = alibi if alibi.dim() == 4 else alibi.unflatten(0, (-1, self.total))
            cut = by_head[:, self.heads]
            kwargs = {**kwargs, "alibi": cut if alibi.dim() == 4 else cut.flatten(0, 1)}
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 4 and mask.shape[1] == self.total > 1:
            kwargs = {**kwargs, "attention_mask": mask[:, self.heads]}
        return args, kwargs


def kept_slopes(module: nn.Module) -> KeptSlopes | None:
    """The hook that gives `module` the slopes of the heads it has kept; None where it has kept all."""
    return next((hook for hook in module._forward_pre_hooks.values() if isinstance(hook, KeptSlopes)), None)
