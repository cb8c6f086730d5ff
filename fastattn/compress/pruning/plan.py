"""From what a caller asks for to which heads, neurons and layers go: checked, then chosen."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastattn.compress.pruning.ffn import check_neurons, choose_neurons
from fastattn.compress.pruning.heads import check_heads, choose_heads, counts_that_fit, together
from fastattn.compress.pruning.importance import Importance
from fastattn.compress.pruning.layers import check_layers, choose_layers
from fastattn.compress.pruning.structure import AttentionSite, LayerStack, Part, Structure

__all__ = ["Amount", "Plan", "Request", "Selection", "check_amount", "excluded_sites", "without"]

Selection = Mapping[str, Sequence[int]]
Amount = float | int | Selection


@dataclass(frozen=True)
class Plan:
    """What goes, by the names of attention layers, feed-forward layers and stacks."""

    heads: dict[str, tuple[int, ...]] = field(default_factory=dict)
    neurons: dict[str, tuple[int, ...]] = field(default_factory=dict)
    layers: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not any((*self.heads.values(), *self.neurons.values(), *self.layers.values()))


@dataclass(frozen=True)
class Request:
    """A caller's amounts, checked against a model's structure; `excluded` are the names left alone."""

    structure: Structure
    heads: Amount
    ffn: Amount
    layers: int | Sequence[int] | Mapping[str, int | Sequence[int]]
    excluded: frozenset[str]

    def __post_init__(self) -> None:
        check_amount("heads", self.heads, [site.name for site in self.structure.attentions])
        check_amount("ffn", self.ffn, [site.name for site in self.structure.feed_forwards])
        for name in [*_names(self.heads), *_names(self.ffn)]:
            if name in self.excluded:
                raise ValueError(f"{name!r} is both named and excluded")
        self._check_heads()
        self._check_neurons()
        for stack, amount in self._stack_amounts():
            self._check_stack(stack, amount)

    @property
    def parts(self) -> list[Part]:
        """All that may be cut for heads and neurons."""
        asked: list[Part] = []
        for site in self.structure.blocks:
            amount = self.heads if isinstance(site, AttentionSite) else self.ffn
            if site.name not in self.excluded and (
                amount.get(site.name) if isinstance(amount, Mapping) else amount
            ):
                asked += site.parts
        return asked

    @property
    def chosen_of(self) -> Structure:
        """What must be measured to choose by importance: nothing where the caller named all that goes."""
        heads, ffn, layers = (
            any(not isinstance(amount, Mapping | Sequence) and amount for amount in amounts)
            for amounts in ([self.heads], [self.ffn], [amount for _, amount in self._stack_amounts()])
        )
        free = without(self.structure, self.excluded)
        # A layer is as important as all in it, left alone or not.
        found = self.structure if layers else free
        return Structure(
            found.attentions if heads or layers else (),
            found.feed_forwards if ffn or layers else (),
            self.structure.stacks,
        )

    def plan(self, importance: Importance) -> Plan:
        """What goes; `importance` is that of `chosen_of`."""
        plan = Plan()
        for stack, amount in self._stack_amounts():
            if not isinstance(amount, int):
                plan.layers[stack.name] = tuple(amount)
            elif amount:
                scores = importance.layer_scores(stack)
                plan.layers[stack.name] = choose_layers(stack, amount, scores, self._staying(stack))
        dropped = tuple(
            f"{stack.name}.{index}."
            for stack in self.structure.stacks
            if not stack.repeats
            for index in plan.layers.get(stack.name, ())
        )
        for group in self._head_groups():
            if isinstance(self.heads, Mapping):
                removed: tuple[int, ...] = tuple(self.heads.get(group[0].name, ()))
            else:
                removed = self._chosen_heads(group, importance)
            for site in group:
                # What linked layers share may be a dropped layer's, which hands it on.
                if site.linked or not (dropped and f"{site.name}.".startswith(dropped)):
                    plan.heads[site.name] = removed
        for feed_forward in self.structure.feed_forwards:
            name = feed_forward.name
            if name in self.excluded or (dropped and f"{name}.".startswith(dropped)):
                continue
            if isinstance(self.ffn, Mapping):
                plan.neurons[name] = tuple(self.ffn.get(name, ()))
            elif count := feed_forward.removable(_count(self.ffn, feed_forward.width)):
                plan.neurons[name] = choose_neurons(count, importance.neurons[name])
        return plan

    def _head_groups(self) -> list[list[AttentionSite]]:
        groups = together(self.structure.attentions)
        return [group for group in groups if not any(site.name in self.excluded for site in group)]

    def _chosen_heads(self, group: list[AttentionSite], importance: Importance) -> tuple[int, ...]:
        assert not isinstance(self.heads, Mapping)
        site = group[0]
        count = _count(self.heads, site.num_heads)
        # A ratio is met as nearly as grouped queries allow, never exceeded.
        count = max(each for each in counts_that_fit(site) if each <= count)
        if not count:
            return ()
        total = sum(importance.heads[each.name] for each in group)
        assert not isinstance(total, int)
        return choose_heads(site, count, total)

    def _check_heads(self) -> None:
        sites = {site.name: site for site in self.structure.attentions}
        if isinstance(self.heads, Mapping):
            for name, removed in self.heads.items():
                check_heads(sites[name], removed)
            for group in together(sites.values()):
                asked = {site.name: sorted(self.heads.get(site.name, ())) for site in group}
                if len({tuple(heads) for heads in asked.values()}) > 1:
                    raise ValueError(
                        f"{', '.join(asked)} share a bias that is made by head and must lose the same heads; "
                        f"got {asked}"
                    )
            return
        if isinstance(self.heads, float):
            return
        for group in self._head_groups():
            site = group[0]
            if self.heads not in counts_that_fit(site):
                raise ValueError(
                    f"{self.heads} heads cannot be removed of {site.name!r}: it has {site.num_heads} query "
                    f"heads and {site.num_kv_heads} key heads, so that "
                    f"{', '.join(map(str, counts_that_fit(site)))} can"
                )

    def _check_neurons(self) -> None:
        sites = {site.name: site for site in self.structure.feed_forwards}
        if isinstance(self.ffn, Mapping):
            for name, removed in self.ffn.items():
                check_neurons(sites[name], removed)
        elif isinstance(self.ffn, int):
            for site in sites.values():
                if site.name not in self.excluded:
                    check_neurons(site, range(self.ffn))

    def _stack_amounts(self) -> list[tuple[LayerStack, int | Sequence[int]]]:
        stacks = {stack.name: stack for stack in self.structure.stacks}
        if isinstance(self.layers, Mapping):
            unknown = [name for name in self.layers if name not in stacks]
            if unknown:
                raise ValueError(f"layers names {unknown[0]!r}; the model's stacks are {', '.join(stacks)}")
            return [(stacks[name], amount) for name, amount in self.layers.items()]
        if isinstance(self.layers, Sequence) and len(stacks) != 1:
            raise ValueError(
                f"layers is a list of indices, and the model has {len(stacks)} stacks: name them, as in "
                f"layers={{name: indices}}, of {', '.join(stacks) or 'which it has none'}"
            )
        if not self.layers:
            return []
        return [(stack, self.layers) for stack in stacks.values()]

    def _check_stack(self, stack: LayerStack, amount: int | Sequence[int]) -> None:
        if isinstance(amount, bool) or not isinstance(amount, int | Sequence) or isinstance(amount, str):
            raise TypeError(f"layers must be counts or lists of indices; got {amount!r} for {stack.name!r}")
        staying = self._staying(stack)
        if isinstance(amount, int):
            if amount < 0 or amount > stack.depth - max(len(staying), 1):
                raise ValueError(
                    f"{amount} layers cannot be removed of {stack.name!r}: it has {stack.depth}"
                    + (f", of which {len(staying)} must stay" if staying else "")
                )
            check_layers(stack, [index for index in range(stack.depth) if index not in staying][:amount])
            return
        check_layers(stack, amount)
        kept = sorted(set(amount) & set(staying))
        if kept:
            raise ValueError(f"layers {kept} of {stack.name!r} are both named and excluded")

    def _staying(self, stack: LayerStack) -> list[int]:
        """The layers that cannot go: those with something excluded, and a first that stays."""
        excluded = self.excluded
        prefixes = [f"{stack.name}.{index}" for index in range(len(stack.layers))]
        held = [
            index
            for index, prefix in enumerate(prefixes)
            if any(f"{name}.".startswith(f"{prefix}.") for name in excluded)
        ]
        if stack.repeats:
            return list(range(stack.depth)) if held else []
        return sorted({*held, 0}) if stack.first_stays else held


def check_amount(argument: str, amount: Any, names: Sequence[str]) -> None:
    """Raise where `amount` is not a ratio in [0, 1), a count, or indices by known names."""
    accepted = "a ratio in [0, 1), a count for every layer, or indices by layer name"
    if isinstance(amount, Mapping):
        for name, removed in amount.items():
            if name not in names:
                known = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                raise ValueError(f"{argument} names {name!r}; the model's are {known or 'none'}")
            if isinstance(removed, str) or not isinstance(removed, Iterable):
                raise TypeError(f"{argument}[{name!r}] is {removed!r}; it must be a list of indices")
    elif isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"{argument} is {amount!r}; it must be {accepted}")
    elif amount < 0 or (isinstance(amount, float) and not amount < 1):
        raise ValueError(f"{argument} is {amount!r}; it must be {accepted}")


def _names(amount: Amount) -> list[str]:
    return list(amount) if isinstance(amount, Mapping) else []


def _count(amount: float | int, whole: int) -> int:
    """How many of `whole` a ratio or a count stands for; a ratio's are rounded down."""
    # 0.29 of 100 is 28.999999999999996.
    return int(amount * whole + 1e-9) if isinstance(amount, float) else amount


def excluded_sites(model: nn.Module, structure: Structure, exclude: Sequence[str]) -> frozenset[str]:
    """The names of the sites and of all modules that `exclude` leaves alone, as patterns of `named_modules`'
    names: a site in an excluded module, or with a part that is one.

    Raises:
        ValueError: a pattern that no module is called.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in exclude:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"exclude names {pattern!r}, which no module of the model is called")
    modules = {name for name in names if any(fnmatch.fnmatchcase(name, each) for each in exclude)}
    found = set(modules)
    for site in structure.blocks:
        owned = {site.name, *(part.name for part in site.parts)}
        if any(f"{name}.".startswith(f"{module}.") for name in owned for module in modules):
            found.add(site.name)
    return frozenset(found)


def without(structure: Structure, excluded: frozenset[str]) -> Structure:
    """The structure without the sites that are left alone; linked ones only together."""
    linked = {site.linked for site in structure.attentions if site.linked and site.name in excluded}
    return Structure(
        tuple(
            site
            for site in structure.attentions
            if site.name not in excluded and not (site.linked and site.linked in linked)
        ),
        tuple(site for site in structure.feed_forwards if site.name not in excluded),
        structure.stacks,
    )
