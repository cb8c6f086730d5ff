"""The heads and neurons to remove for a model to be so many times as fast here, at the least loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastattn.bench.ratio import Ratio, paired_ratio
from fastattn.compress.calibration import Batch, Calibration
from fastattn.compress.pruning.ffn import choose_neurons
from fastattn.compress.pruning.heads import choose_heads, together
from fastattn.compress.pruning.importance import Importance
from fastattn.compress.pruning.latency_table import (
    LatencyTable,
    Site,
    Timing,
    cut_copy,
    kind_of,
    latency_table,
    measured_ms,
    sizes_of,
)
from fastattn.compress.pruning.plan import Plan
from fastattn.compress.pruning.structure import AttentionSite, FeedForwardSite, Structure

__all__ = ["LatencyTable", "SearchResult", "check_target", "search", "workload_of"]

# Steps that the time to save is counted in: rounding loses at most one a block.
_STEPS = 20_000
# Plans tried: what two blocks save together is not quite the sum, so a plan is timed and the aim corrected.
_ATTEMPTS = 4
# A measured speed-up up to this much above the target is not worth another plan.
_ABOVE = 1.05


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        plan: what goes.
        target: the speed-up that was asked for.
        predicted: the one that the table promises.
        measured: the one measured of the whole model, in the same rounds as the untouched one.
        ratio: the same with its 95% interval; None with fewer than six rounds.
        loss: the sum over blocks of -log(the share of importance kept).
        table: the times it rests on.
    """

    plan: Plan
    target: float
    predicted: float
    measured: float
    ratio: Ratio | None
    loss: float
    table: LatencyTable

    @property
    def notes(self) -> list[str]:
        """What the report says."""
        measured = f"{self.measured:.2f}x" if self.ratio is None else str(self.ratio)
        notes = [
            f"speed-up: {self.target:.2f}x asked for, {self.predicted:.2f}x predicted by the latency table, "
            f"{measured} measured beside the untouched model",
            f"timed on {self.table.workload}; {self.table.machine}",
        ]
        if self.measured < self.target:
            notes.append(
                f"the target is not reached: {_ATTEMPTS} plans were timed and this was the fastest; what is "
                "left of the time is in parts that cannot be cut, or the machine is busy"
            )
        return notes


@dataclass(frozen=True)
class _Option:
    """One size of a group of blocks that are cut alike."""

    removed: tuple[int, ...]
    saved_ms: float
    loss: float


def check_target(target_speedup: Any) -> float:
    """`target_speedup` as a float.

    Raises:
        ValueError: it is no finite number above 1.

    Example:
        >>> check_target(2)
        2.0
    """
    number = isinstance(target_speedup, int | float) and not isinstance(target_speedup, bool)
    if not number or not 1 < target_speedup < math.inf:
        raise ValueError(f"target_speedup is {target_speedup!r}; it must be a number above 1, such as 2.0")
    return float(target_speedup)


def workload_of(model: nn.Module, calibration: Calibration | None) -> Batch:
    """What the model is timed on: the first batch of `calibration`, without labels, else tokens as
    `fastattn.benchmark` has them: 8 sequences of up to 128 for an encoder, a prompt of 128 for a decoder.

    Raises:
        ValueError: there is no calibration, and the model does not take token ids alone.
    """
    encodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if calibration is not None:
        batch = calibration.batches[0]
        if isinstance(batch, Mapping) and (not encodes or "decoder_input_ids" in batch):
            return {name: value for name, value in batch.items() if name != "labels"}
        return batch
    from fastattn.bench.contenders.source import kind_of as kind_of_model
    from fastattn.bench.contenders.source import token_inputs
    from fastattn.bench.workloads import auto_workloads, maximum_positions

    takes = getattr(model, "main_input_name", None)
    if not hasattr(model, "config") or takes != "input_ids" or not hasattr(model.config, "vocab_size"):
        raise ValueError(
            f"target_speedup needs calibration for a {type(model).__name__}: its first batch is what is timed"
        )
    workload = auto_workloads(kind_of_model(model), maximum_positions(model))[0]
    tokens = dict(token_inputs(model, workload, next(model.parameters()).device))
    return {**tokens, "decoder_input_ids": tokens["input_ids"]} if encodes else tokens


def search(
    model: nn.Module,
    structure: Structure,
    target_speedup: float,
    importance: Importance,
    *,
    batch: Batch,
    timing: Timing = measured_ms,
    budget_s: float = 60.0,
) -> SearchResult:
    """Sizes for every block that make the model `target_speedup` times as fast on `batch`, at the least loss.

    Times are `latency_table`'s, embeddings, heads and all that stays included. A block that keeps the share k
    of its importance costs -log(k): shares multiply along the network, and the last heads cost the most.
    The sizes are the exact optimum of that sum under the time (dynamic programming over blocks, as E. Kurtic,
    E. Frantar and D. Alistarh, "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, search).
    The plan is then timed beside the untouched model, and the aim corrected where it falls short or goes far
    past.

    Args:
        model: left as it is.
        structure: the blocks that may be cut, linked ones all of them or none.
        target_speedup: above 1.
        importance: of all heads and neurons of `structure`.
        batch: the workload.
        timing: measures; replaced by tests.
        budget_s: seconds of timing for the table, where it is not kept from earlier; as much again, at most,
            for the plans.

    Raises:
        ValueError: no finite number above 1, or more than all cuts together give.
    """
    target = check_target(target_speedup)
    table = latency_table(model, structure, batch, timing, budget_s)
    groups: list[list[Site]] = [list(group) for group in together(structure.attentions)]
    groups += [[site] for site in structure.feed_forwards]
    options = [_options(group, importance, table) for group in groups]
    most = sum(max(option.saved_ms for option in group) for group in options)
    if _least_loss(options, table.full_ms * (1 - 1 / target)) is None:
        raise ValueError(
            f"target_speedup is {target:g}; with the fewest heads and neurons in every layer the model is "
            f"{table.full_ms / (table.full_ms - most):.2f} times as fast on {table.workload}: ask for less, "
            "or remove layers first"
        )
    whole = cut_copy(model, Plan())
    aim = target
    tried: list[SearchResult] = []
    for _ in range(_ATTEMPTS):
        chosen = _least_loss(options, table.full_ms * (1 - 1 / aim))
        if chosen is None:
            break
        result = _timed(model, whole, groups, chosen, target, table, batch, timing, budget_s / _ATTEMPTS)
        tried.append(result)
        if target <= result.measured <= _ABOVE * target:
            break
        # A step past the middle of what is accepted would swing to and fro.
        aim = max(aim * target / result.measured * (1 + _ABOVE) / 2, 1 + 1e-6)
    reached = [result for result in tried if result.measured >= target]
    if reached:
        return min(reached, key=lambda result: result.loss)
    return max(tried, key=lambda result: result.measured)


def _options(group: Sequence[Site], importance: Importance, table: LatencyTable) -> list[_Option]:
    """Every size of a group of blocks, the whole one first."""
    first = group[0]
    by_unit = importance.heads if isinstance(first, AttentionSite) else importance.neurons
    scores = torch.stack([by_unit[site.name] for site in group]).sum(dim=0)
    total = float(scores.sum())
    found = [_Option((), 0.0, 0.0)]
    for size in sizes_of(first):
        removed = _removed(first, size, scores)
        # Where nothing has any importance, every head and neuron counts alike.
        lost = float(scores[list(removed)].sum()) / total if total > 0 else len(removed) / len(scores)
        saved = sum(table.saved_ms(kind_of(site), size) for site in group)
        found.append(_Option(removed, saved, -len(group) * math.log(max(1 - lost, 1e-6))))
    return found


def _removed(site: Site, size: int, scores: Tensor) -> tuple[int, ...]:
    if isinstance(site, FeedForwardSite):
        return choose_neurons(site.width - size, scores)
    return choose_heads(site, site.num_heads - size, scores)


def _least_loss(options: Sequence[Sequence[_Option]], needed_ms: float) -> list[_Option] | None:
    """One option a group, saving `needed_ms` in all at the least sum of losses; None where none does."""
    unit = needed_ms / _STEPS
    left = np.arange(_STEPS + 1)
    # best[r]: the least loss of the groups from here on that save r steps; after the last, nothing is saved.
    best = np.full(_STEPS + 1, np.inf)
    best[0] = 0.0
    choices: list[np.ndarray[Any, Any]] = []
    for group in reversed(options):
        costs = np.empty((len(group), _STEPS + 1))
        for index, option in enumerate(group):
            remaining = np.maximum(left - math.floor(option.saved_ms / unit), 0)
            within = remaining <= _STEPS
            costs[index] = np.where(within, best[np.minimum(remaining, _STEPS)], np.inf) + option.loss
        choices.append(costs.argmin(axis=0))
        best = costs.min(axis=0)
    if not np.isfinite(best[_STEPS]):
        return None
    chosen, remaining_steps = [], _STEPS
    for group, choice in zip(options, reversed(choices), strict=True):
        option = group[int(choice[remaining_steps])]
        chosen.append(option)
        remaining_steps = max(remaining_steps - math.floor(option.saved_ms / unit), 0)
    return chosen


def _timed(
    model: nn.Module,
    whole: nn.Module,
    groups: Sequence[Sequence[Site]],
    chosen: Sequence[_Option],
    target: float,
    table: LatencyTable,
    batch: Batch,
    timing: Timing,
    budget_s: float,
) -> SearchResult:
    plan = Plan()
    for group, option in zip(groups, chosen, strict=True):
        for site in group:
            if option.removed:
                goes = plan.heads if isinstance(site, AttentionSite) else plan.neurons
                goes[site.name] = option.removed
    full, cut = timing([whole, cut_copy(model, plan)], batch, budget_s)
    return SearchResult(
        plan=plan,
        target=target,
        predicted=table.full_ms / (table.full_ms - sum(option.saved_ms for option in chosen)),
        measured=statistics.median(before / after for before, after in zip(full, cut, strict=True)),
        ratio=paired_ratio(full, cut, "untouched"),
        loss=sum(option.loss for option in chosen),
        table=table,
    )
