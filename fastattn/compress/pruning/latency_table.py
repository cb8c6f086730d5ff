"""How long a model takes with fewer heads or neurons, measured on this machine and kept for the next time.

A block's time is not measured on its own: the whole model is, with all blocks of a kind cut to one size,
beside the uncut one. What a block of that size saves is the difference over the number of blocks. So
embeddings, norms, heads and all that stays are in the figures, and it makes no difference which code computes
a block.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.contender import Contender
from fastattn.bench.files import write_text
from fastattn.bench.timing import measure
from fastattn.compress.calibration import Batch
from fastattn.compress.pruning.ffn import remove_neurons
from fastattn.compress.pruning.heads import choose_heads, counts_that_fit, remove_heads
from fastattn.compress.pruning.plan import Plan
from fastattn.compress.pruning.structure import AttentionSite, FeedForwardSite, Structure, sites
from fastattn.tuning.cache import cache_file
from fastattn.tuning.machine import this_machine

__all__ = [
    "LatencyTable",
    "Timing",
    "cut_copy",
    "kind_of",
    "latency_table",
    "measured_ms",
    "sizes_of",
    "stored_in",
]

SCHEMA = "fastattn.latency/1"

Site = AttentionSite | FeedForwardSite
# Models and what they are run on, and seconds to spend -> times in milliseconds by model, of the same rounds.
Timing = Callable[[Sequence[nn.Module], Batch, float], Sequence[Sequence[float]]]

# Sizes measured of a kind of block, the whole one not counted.
_SIZES = 12
# Copies timed together: each holds what was cut for it, and one more whole model is timed for every group.
_TOGETHER = 4
# A matrix product takes as long for 1,000 columns as for 1,024: neurons go in steps of this many where there
# are hundreds of them.
_GRAIN = 64


@dataclass(frozen=True)
class LatencyTable:
    """Times of one model on one workload of one machine.

    Attributes:
        machine: `fastattn.tuning.Machine.key`, with the number of threads.
        workload: what the model was run on, in words: shapes, real tokens, data type.
        full_ms: of the whole model.
        blocks: kind of block -> how many the model has.
        sizes: kind -> {heads or neurons a block: milliseconds of the model with all blocks of the kind so}.

    Example:
        >>> table = LatencyTable("cpu", "8 x 128", 12.0, {"mlp": 6}, {"mlp": {512: 9.0, 1024: 10.5}})
        >>> table.saved_ms("mlp", 512)
        0.5
    """

    machine: str
    workload: str
    full_ms: float
    blocks: Mapping[str, int]
    sizes: Mapping[str, Mapping[int, float]]

    def saved_ms(self, kind: str, size: int) -> float:
        """What one block of `kind` saves at `size` heads or neurons."""
        return (self.full_ms - self.sizes[kind][size]) / self.blocks[kind]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, held: Mapping[str, Any]) -> LatencyTable:
        """The table that `to_dict` was called on, from JSON, too."""
        sizes = {
            kind: {int(size): float(ms) for size, ms in row.items()} for kind, row in held["sizes"].items()
        }
        return cls(held["machine"], held["workload"], float(held["full_ms"]), dict(held["blocks"]), sizes)


def latency_table(
    model: nn.Module, structure: Structure, batch: Batch, timing: Timing, budget_s: float
) -> LatencyTable:
    """The table of `model` on `batch`: the one kept from earlier, else measured, and kept.

    Args:
        model: what is to be pruned; it is left as it is.
        structure: of `model`: the blocks that may be cut.
        batch: what it is run on.
        timing: measures; `measured_ms`, or what takes its place.
        budget_s: seconds of timing altogether.
    """
    kinds = _kinds(structure)
    machine, workload = _machine(model), _workload(model, batch)
    key = _key(model, {kind: len(of) for kind, of in kinds.items()}, machine, workload)
    held = _load(key)
    if held is not None:
        return held
    cuts = [(kind, size) for kind, of in kinds.items() for size in sizes_of(of[0])]
    groups = [cuts[start : start + _TOGETHER] for start in range(0, len(cuts), _TOGETHER)]
    whole = cut_copy(model, Plan())
    fulls: list[float] = []
    shares: dict[tuple[str, int], float] = {}
    for group in groups:
        copies = [cut_copy(model, _uniform(kinds[kind], size)) for kind, size in group]
        full, *others = timing([whole, *copies], batch, budget_s / len(groups))
        fulls.append(statistics.median(full))
        for cut, other in zip(group, others, strict=True):
            # Of the same round: a shared machine's drift cancels in the quotient.
            shares[cut] = statistics.median(its / all_ for its, all_ in zip(other, full, strict=True))
    full_ms = statistics.median(fulls)
    times = {kind: _rising({s: ms * full_ms for (k, s), ms in shares.items() if k == kind}) for kind in kinds}
    table = LatencyTable(machine, workload, full_ms, {kind: len(of) for kind, of in kinds.items()}, times)
    _save(key, table)
    return table


def _rising(times: Mapping[int, float]) -> dict[int, float]:
    """The nearest times, by squares, that never fall as the size grows (isotonic regression, by pooling
    neighbours): a search would pick the sizes that were lucky on a busy machine. A size that truly takes
    longer than a larger one is levelled with it, and is not chosen.
    """
    pools: list[tuple[float, list[int]]] = []
    for size in sorted(times):
        mean, pool = times[size], [size]
        while pools and pools[-1][0] > mean:
            before, members = pools.pop()
            mean = (before * len(members) + mean * len(pool)) / (len(members) + len(pool))
            pool = members + pool
        pools.append((mean, pool))
    return {size: mean for mean, pool in pools for size in pool}


def kind_of(site: Site) -> str:
    """What blocks must have in common to take the same time: their place in a layer, and their shape."""
    place = ".".join("*" if step.isdecimal() else step for step in site.name.split("."))
    if isinstance(site, FeedForwardSite):
        return f"{place}: {site.width} neurons of {site.hidden_size}"
    shape = f"{site.num_heads} heads, {site.num_kv_heads} key heads, {site.head_dim} of {site.hidden_size}"
    return f"{site.linked or place}: {shape}"


def sizes_of(site: Site) -> list[int]:
    """The numbers of heads or neurons a block is measured with, its own not among them, ascending."""
    if isinstance(site, AttentionSite):
        sizes = sorted(site.num_heads - count for count in counts_that_fit(site) if count)
    else:
        grain = math.lcm(_GRAIN if site.width >= 8 * _GRAIN else 1, site.multiple)
        sizes = list(range(grain, site.width, grain))
    if len(sizes) <= _SIZES:
        return sizes
    return [sizes[round(place * (len(sizes) - 1) / (_SIZES - 1))] for place in range(_SIZES)]


def cut_copy(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy in eval mode that lost what `plan` names, and shares the tensors that lost nothing."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    duplicate = copy.deepcopy(model, dict(shared)).eval()
    structure = sites(duplicate)
    remove_heads(duplicate, {s: h for s in structure.attentions if (h := plan.heads.get(s.name))})
    remove_neurons({s: n for s in structure.feed_forwards if (n := plan.neurons.get(s.name))})
    return duplicate


def measured_ms(models: Sequence[nn.Module], batch: Batch, budget_s: float) -> list[Sequence[float]]:
    """Times of `models` on `batch`, run in turn.

    Raises:
        RuntimeError: one of them cannot be run.
    """
    device = next(models[0].parameters()).device
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})
    args = tuple(_moved(value, device) for value in args)
    kwargs = {name: _moved(value, device) for name, value in kwargs.items()}
    contenders = [
        Contender(str(index), partial(model, *args, **kwargs)) for index, model in enumerate(models)
    ]
    with torch.no_grad():
        rows = measure(contenders, device=device.type, budget_s=budget_s, until=0.02, resources=False)
    failed = [row for row in rows if row.status != "measured"]
    if failed:
        raise RuntimeError(f"the model could not be timed: {failed[0].reason}")
    return [row.wall_ms for row in rows]


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _kinds(structure: Structure) -> dict[str, list[Site]]:
    kinds: dict[str, list[Site]] = {}
    found: list[Site] = [*structure.attentions, *structure.feed_forwards]
    for site in found:
        kinds.setdefault(kind_of(site), []).append(site)
    return kinds


def _uniform(alike: Sequence[Site], size: int) -> Plan:
    """All these blocks with `size` heads or neurons; which of them stay makes no difference to time."""
    plan = Plan()
    for site in alike:
        if isinstance(site, AttentionSite):
            scores = torch.zeros(site.num_heads)
            plan.heads[site.name] = choose_heads(site, site.num_heads - size, scores)
        else:
            plan.neurons[site.name] = tuple(range(size, site.width))
    return plan


def _machine(model: nn.Module) -> str:
    device = next(model.parameters()).device.type
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return f"{this_machine('cuda' if device == 'cuda' else 'cpu').key}{threads}"


def _workload(model: nn.Module, batch: Batch) -> str:
    named = (
        batch.items() if isinstance(batch, Mapping) else ((str(i), value) for i, value in enumerate(batch))
    )
    shapes = []
    for name, value in named:
        if isinstance(value, Tensor):
            shapes.append(f"{name} [{' x '.join(map(str, value.shape))}]")
            if "mask" in name and value.dim() == 2:
                shapes[-1] += f" {float(value.float().mean()):.0%} real"
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    return f"{', '.join(shapes)}; {' and '.join(dtypes)}"


def _key(model: nn.Module, blocks: Mapping[str, int], machine: str, workload: str) -> str:
    """Differs where times could: by the classes that compute, too, such as fused layers'."""
    classes = [
        f"{name} {type(module).__module__}.{type(module).__qualname__}"
        for name, module in model.named_modules()
    ]
    shapes = [f"{name} {list(parameter.shape)}" for name, parameter in model.named_parameters()]
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    text = json.dumps([machine, workload, blocks, classes, shapes, attention])
    return hashlib.sha256(text.encode()).hexdigest()


def stored_in() -> Path:
    """The file that tables are kept in, beside what `fastattn tune` writes."""
    return cache_file().with_name("latency.json")


def _tables() -> dict[str, Any]:
    try:
        held = json.loads(stored_in().read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):
        # RuntimeError: a user without a home folder has no cache. A damaged file is measured anew.
        return {}
    if not isinstance(held, dict) or held.get("schema") != SCHEMA or not isinstance(held.get("tables"), dict):
        return {}
    return dict(held["tables"])


def _load(key: str) -> LatencyTable | None:
    try:
        return LatencyTable.from_dict(_tables()[key])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _save(key: str, table: LatencyTable) -> None:
    try:
        path = stored_in()
        path.parent.mkdir(parents=True, exist_ok=True)
        tables = {**_tables(), key: table.to_dict()}
        write_text(path, json.dumps({"schema": SCHEMA, "tables": tables}, indent=1) + "\n")
    except (OSError, RuntimeError) as error:
        warnings.warn(f"the latency table is not kept: {error}", RuntimeWarning, stacklevel=3)
