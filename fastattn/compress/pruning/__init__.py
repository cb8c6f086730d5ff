"""`fastattn.prune`: heads, neurons, layers and single weights out of a model, by how little they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from fastattn.compress.calibration import Calibration
from fastattn.compress.configs import own_configs
from fastattn.compress.pruning.ffn import remove_neurons
from fastattn.compress.pruning.heads import remove_heads
from fastattn.compress.pruning.importance import check_importance, measure
from fastattn.compress.pruning.latency import check_target, search, workload_of
from fastattn.compress.pruning.layers import relink, remove_layers
from fastattn.compress.pruning.plan import Amount, Plan, Request, excluded_sites, without
from fastattn.compress.pruning.report import PrunedPart, PruneReport
from fastattn.compress.pruning.saved import record_shapes, saved_models
from fastattn.compress.pruning.semi_structured import prune_2_4
from fastattn.compress.pruning.structure import Structure, sites
from fastattn.compress.pruning.surgery import check_cuttable
from fastattn.compress.pruning.unstructured import prune_unstructured
from fastattn.models.family import known_families

__all__ = ["PATTERNS", "PruneReport", "PrunedPart", "prune"]

PATTERNS = ("structured", "unstructured", "2:4")


def prune(
    model: nn.Module,
    heads: Amount = 0.0,
    ffn: Amount = 0.0,
    layers: int | Sequence[int] | Mapping[str, int | Sequence[int]] = 0,
    pattern: str = "structured",
    importance: str = "magnitude",
    calibration: Any = None,
    target_speedup: float | None = None,
    *,
    exclude: Sequence[str] = (),
    sparsity: float | None = None,
) -> PruneReport:
    """Remove what does least from `model`, in place: the same object, smaller.

    What is removed counts as if its output were zero: nothing else of the model changes. Shapes differ from
    layer to layer; they are kept in the configuration, so that `save_pretrained` and `fastattn.load` give the
    pruned model back. Works before and after `fastattn.optimize`; an optimizer of the old parameters must be
    made anew.

    Args:
        model: a transformers model of a known family, or a module built of torch.nn's Transformer layers or
            `fastattn.layers`.
        heads: of each attention layer: a ratio in [0, 1), rounded down; a count; or a mapping of attention
            layers' names to the indices of heads to remove. Grouped queries lose whole groups or the same
            number of heads in every group, whichever costs less. Layers that share a bias made by head (T5,
            MPNet) lose the same heads.
        ffn: of each feed-forward layer: a ratio, a count, or a mapping of names to indices of neurons.
        layers: a count, for every stack of layers (encoder and decoder are two); indices, where there is one
            stack; or a mapping of stacks' names to either.
        pattern: "structured"; "unstructured" and "2:4" set single weights of all linear layers to zero and
            change no shape: `heads`, `ffn` and `layers` must be left alone.
        importance: "magnitude", "taylor" or "wanda"; see `fastattn.compress.pruning.importance`.
        calibration: batches, as `Calibration.of` takes them; "taylor" and "wanda" need them.
        target_speedup: search for heads and neurons, layer by layer, that make the model this much faster on
            this machine at the least loss of importance; `heads`, `ffn` and `layers` must be left alone.
        exclude: names of modules to leave alone, as `named_modules` gives them, with shell wildcards: what is
            in them, and what they are part of.
        sparsity: of pattern "unstructured", the share of weights set to zero, in [0, 1); default a half.

    Returns:
        The report: every layer with what it had and kept.

    Raises:
        TypeError: `model` is not an `nn.Module`, or an argument of another type.
        ValueError: an unknown argument value, a ratio outside [0, 1), a count that a layer cannot lose, a
            name or index that is not there, no calibration where one is needed, nothing in the model that can
            be pruned, or tensors that cannot be cut (quantized, wrapped or tied ones). The model is then as
            before.

    Example:
        >>> import fastattn, transformers
        >>> config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> report = fastattn.prune(transformers.BertModel(config), heads=0.5, ffn=0.25)
        >>> sorted({(part.kind, part.before, part.kept) for part in report.parts})
        [('heads', 4, 2), ('layers', 2, 2), ('neurons', 3072, 2304)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module is accepted")
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}; it must be one of {PATTERNS}")
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    if pattern != "unstructured" and sparsity is not None:
        raise ValueError(f"sparsity is for pattern='unstructured', not {pattern!r}")
    asked = {"heads": heads, "ffn": ffn, "layers": layers}
    asked = {name: amount for name, amount in asked.items() if amount}
    if pattern != "structured":
        if target_speedup is not None:
            asked["target_speedup"] = target_speedup
        _refuse(asked, f"pattern={pattern!r}")
        if pattern == "2:4":
            return prune_2_4(model, importance, calibration, exclude)
        return prune_unstructured(
            model, 0.5 if sparsity is None else sparsity, importance, calibration, exclude
        )
    structure = sites(model)
    if not structure.attentions and not structure.feed_forwards:
        raise ValueError(
            f"{type(model).__name__} has no attention or feed-forward layer of a known family "
            f"({', '.join(known_families())})"
        )
    excluded = excluded_sites(model, structure, exclude)
    free = without(structure, excluded)
    batches = None if calibration is None else Calibration.of(calibration, model)
    if target_speedup is not None:
        _refuse(asked, "target_speedup")
        return _speed_up(model, structure, free, excluded, importance, batches, target_speedup)
    request = Request(structure, heads, ffn, layers, excluded)
    measured = request.chosen_of
    check_cuttable(model, [*request.parts, *(part for site in measured.blocks for part in site.parts)])
    check_importance(importance, calibration, measured)
    return _remove(model, structure, request.plan(measure(model, measured, importance, batches)), excluded)


def _refuse(asked: Mapping[str, Any], where: str) -> None:
    if asked:
        raise ValueError(f"{where} takes no {' or '.join(asked)}; got {', '.join(map(repr, asked.values()))}")


def _speed_up(
    model: nn.Module,
    structure: Structure,
    free: Structure,
    excluded: frozenset[str],
    importance: str,
    calibration: Calibration | None,
    target: float,
) -> PruneReport:
    """Remove what makes the model `target` times as fast at the least loss."""
    target = check_target(target)
    check_importance(importance, calibration, free)
    check_cuttable(model, [part for site in free.blocks for part in site.parts])
    batch = workload_of(model, calibration)
    found = search(model, free, target, measure(model, free, importance, calibration), batch=batch)
    report = _remove(model, structure, found.plan, excluded)
    report.speedup = {"target": target, "predicted": found.predicted, "measured": found.measured}
    report.notes += found.notes
    return report


def _remove(model: nn.Module, structure: Structure, plan: Plan, excluded: frozenset[str]) -> PruneReport:
    """Carry a checked plan out."""
    report = PruneReport(_parts(structure, plan, excluded), _parameters(model))
    if not plan.empty:
        own_configs(model)
        # Again, with the configurations that are the model's own now.
        structure = sites(model)
        remove_heads(model, {s: h for s in structure.attentions if (h := plan.heads.get(s.name))})
        remove_neurons({s: n for s in structure.feed_forwards if (n := plan.neurons.get(s.name))})
        positions = {}
        for stack in structure.stacks:
            removed = plan.layers.get(stack.name, ())
            if removed:
                remove_layers(stack, removed)
                positions[stack.name] = [index for index in range(stack.depth) if index not in removed]
        if positions:
            relink(model)
        record_shapes(model, positions)
    report.parameters_after = _parameters(model)
    if not plan.empty and not saved_models(model):
        report.notes.append(
            "the model has no configuration to keep its shapes in: keep `saved.shapes_of(model)` beside its "
            "state_dict, for `saved.apply_shapes`"
        )
    return report


def _parts(structure: Structure, plan: Plan, excluded: frozenset[str]) -> list[PrunedPart]:
    """The report's entries, in the order of the model's modules."""
    parts = []
    names = [
        *((site.name, "heads", site.num_heads, plan.heads) for site in structure.attentions),
        *((site.name, "neurons", site.width, plan.neurons) for site in structure.feed_forwards),
    ]
    for stack in structure.stacks:
        gone = plan.layers.get(stack.name, ())
        parts.append(PrunedPart(stack.name, "layers", stack.depth, stack.depth - len(gone)))
        if not stack.repeats:
            dropped = tuple(f"{stack.name}.{index}." for index in gone)
            names = [each for each in names if not (dropped and f"{each[0]}.".startswith(dropped))]
    for name, kind, before, removed in names:
        reason = "excluded by the caller" if name in excluded else ""
        parts.append(PrunedPart(name, kind, before, before - len(removed.get(name, ())), reason))
    return sorted(parts, key=lambda part: _natural(part.name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    return [(0, int(step), "") if step.isdecimal() else (1, 0, step) for step in name.split(".")]


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
