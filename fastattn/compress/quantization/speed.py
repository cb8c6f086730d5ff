"""How long a linear layer takes quantized and in the precision it had: at a few numbers of rows for the
report, and at the caller's own, surely enough to choose by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from tqdm import tqdm

from fastattn.compress.quantization.settings import QuantizationSettings
from fastattn.compress.quantization.targets import Target, is_read_in_parts
from fastattn.layers import FusedLayer, QuantizedLinear, project
from fastattn.ops import PackedWeight, prepare, quantize_absmax

if TYPE_CHECKING:
    from fastattn.bench import Ratio

__all__ = ["REPORT_ROWS", "ROWS", "Comparison", "LayerTimes", "Stopwatch", "compare_layers", "rows_of"]

# A token of generation, a short sentence, a batch of sentences.
ROWS = (1, 16, 128)
REPORT_ROWS = 128
# Of both together, a shape and number of rows: enough to tell which is faster, not by how much.
_BUDGET_S = 0.02
_ROUNDS = (3, 40)
# To choose by: halfway to a tenth, so that a tenth and nothing are both told for what they are. Two equal
# float layers beside each other come out at 0.985 to 1.035 on a busy machine.
_FASTER = 1.05
# Rounds end when the ratio is known to 2%, or after so long a shape.
_PRECISION = 0.02
_COMPARED_S = 1.0
# Layers of a shape that are called in turn: 96 MB in float32, as `benchmarks/quantized_linears.py` has it.
_COLD_PARAMETERS = 24_000_000


# Milliseconds of one product by its rows: (in the weight's own precision, quantized).
LayerTimes = dict[int, tuple[float, float]]


@dataclass
class Stopwatch:
    """Times each shape once."""

    _known: dict[tuple[object, ...], LayerTimes] = field(default_factory=dict)

    def times(self, weight: Tensor, bias: nn.Parameter | None, packed: PackedWeight) -> LayerTimes:
        """Of `weight` [N, K] and what it was packed to; empty off the CPU, where today's path is the
        reference and says nothing about the later one.
        """
        if weight.device.type != "cpu":
            return {}
        made_of = (packed.scheme, packed.group_size, packed.input_scales is None)
        key = (tuple(weight.shape), weight.dtype, bias is None, *made_of)
        if key not in self._known:
            self._known[key] = _measure(weight.detach(), None if bias is None else bias.detach(), packed)
        return self._known[key]


@torch.no_grad()
def _measure(weight: Tensor, bias: Tensor | None, packed: PackedWeight) -> LayerTimes:
    by_rows = {}
    held = None if bias is None else nn.Parameter(bias, requires_grad=False)
    layer = QuantizedLinear.from_packed(packed, held)
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1], dtype=weight.dtype)
        by_rows[rows] = _least_ms(partial(linear, x, weight, bias), partial(layer, x))
    return by_rows


def _least_ms(first: Callable[[], Tensor], second: Callable[[], Tensor]) -> tuple[float, float]:
    """The shortest call of each, taken in turns: what disturbs a call only makes it longer."""
    first(), second()
    least = [float("inf"), float("inf")]
    begin = perf_counter()
    for done in range(_ROUNDS[1]):
        if done >= _ROUNDS[0] and perf_counter() - begin > _BUDGET_S:
            break
        for index, call in enumerate((first, second)):
            start = perf_counter()
            call()
            least[index] = min(least[index], perf_counter() - start)
    return 1e3 * least[0], 1e3 * least[1]


@dataclass(frozen=True)
class Comparison:
    """A quantized layer beside the float one it would replace.

    Attributes:
        rows: of the input.
        float_ms, quantized_ms: the median call's, of layers that share an input an equal part.
        ratio: float time over quantized time.
        beside: attributes of the layers it was timed together with, because they share its input.
    """

    rows: int
    float_ms: float
    quantized_ms: float
    ratio: Ratio
    beside: tuple[str, ...] = ()

    @property
    def is_faster(self) -> bool:
        """Whether it surely is: by 5% or more, with the whole 95% interval above 1."""
        return self.ratio.low > 1.0 and self.ratio.value >= _FASTER

    def __str__(self) -> str:
        together = f", with {', '.join(self.beside)}" if self.beside else ""
        low, high = self.ratio.low, self.ratio.high
        clear = "" if self.is_faster or high < 1.0 else ": no clear gain"
        said = f"{self.ratio.value:.2f}x as fast at {rows_of(self.rows)} ({low:.2f} to {high:.2f})"
        return f"{said}{together}{clear}"


def rows_of(count: int) -> str:
    """As reports name them."""
    return f"{count} row{'s' if count != 1 else ''}"


def compare_layers(targets: Sequence[Target], settings: QuantizationSettings) -> dict[str, Comparison]:
    """Every layer beside a quantized one at `settings.faster_at` rows, by name; each shape is timed once.

    What fused attention multiplies one input by together (`FusedLayer.projection_names`) is timed together,
    for quantized it rounds the input once. Layers of one shape are called in turn, as a model calls them:
    where they exceed the caches their weights come from memory.

    Args:
        targets: without a reason to stay; nothing in them changes.
        settings: with `smooth` every layer is timed dividing its input, which some norms will take over.

    Raises:
        RuntimeError: a layer cannot be run at so many rows.
    """
    from fastattn.bench import paired_ratio

    assert settings.faster_at is not None
    alike: dict[tuple[object, ...], list[list[Target]]] = {}
    for group in _groups(targets):
        alike.setdefault(_kind(group), []).append(group)
    found: dict[str, Comparison] = {}
    for groups in tqdm(alike.values(), desc="timing layers", disable=None, leave=False, unit=" shapes"):
        float_ms, quantized_ms = _timed(groups, settings)
        ratio = paired_ratio(float_ms, quantized_ms, "float")
        assert ratio is not None
        for group in groups:
            attributes = [target.places[0][1] for target in group]
            for target, own in zip(group, attributes, strict=True):
                found[target.name] = Comparison(
                    settings.faster_at,
                    median(float_ms) / len(group),
                    median(quantized_ms) / len(group),
                    ratio,
                    tuple(each for each in attributes if each != own),
                )
    return found


def _groups(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Layers that multiply one input together, if quantized all of them; each of the others by itself."""
    by_parent: dict[int, dict[str, Target]] = {}
    for target in targets:
        for parent, attribute in target.places:
            by_parent.setdefault(id(parent), {})[attribute] = target
    done: set[str] = set()
    for target in targets:
        parent = target.places[0][0]
        siblings = by_parent[id(parent)]
        names = parent.projection_names if isinstance(parent, FusedLayer) else ()
        group = [siblings[name] for name in names if name in siblings]
        if target not in group or len(group) < len(names) or any(len(each.places) > 1 for each in group):
            group = [target]
        if target.name not in done:
            done.update(each.name for each in group)
            yield group


def _kind(group: Sequence[Target]) -> tuple[object, ...]:
    """What two groups that take the same time agree in."""
    layers = tuple(
        (each.kind, tuple(each.weight.shape), each.weight.dtype, each.weight.device, each.bias is None)
        for each in group
    )
    return _is_fused(group[0]), is_read_in_parts(group[0]), *layers


def _is_fused(target: Target) -> bool:
    return isinstance(target.places[0][0], FusedLayer)


@torch.no_grad()
def _timed(groups: Sequence[Sequence[Target]], settings: QuantizationSettings) -> tuple[list[float], ...]:
    """Milliseconds of the float layers and of quantized ones, in pairs, of groups that are alike."""
    from fastattn.bench import Contender, measure

    first = groups[0]
    held = sum(target.weight.numel() for target in first)
    groups = groups[: max(1, -(-_COLD_PARAMETERS // held))]
    floats = [[target.layer for target in group] for group in groups]
    packed = [_stand_in(target, settings) for target in first]
    quantized = [
        [
            QuantizedLinear.from_packed(replace(each, values=each.values.clone()), target.bias)
            for each, target in zip(packed, group, strict=True)
        ]
        for group in groups
    ]
    weight = first[0].weight
    assert settings.faster_at is not None
    shape = (settings.faster_at, weight.shape[1])
    try:
        x = torch.randn(shape, dtype=weight.dtype, device=weight.device)
    except RuntimeError as error:
        raise RuntimeError(
            f"faster_at: an input of {shape[0]} rows, {shape[1]} wide, for {first[0].name}, cannot be made"
        ) from error
    rows = measure(
        [
            Contender("float", _call(x, floats, _is_fused(first[0]))),
            Contender("quantized", _call(x, quantized, _is_fused(first[0]))),
        ],
        device=weight.device.type,
        budget_s=_COMPARED_S,
        until=_PRECISION,
        resources=False,
    )
    for row in rows:
        if row.status != "measured":
            raise RuntimeError(
                f"faster_at: {first[0].name} could not be timed at {rows_of(len(x))}, {row.name}: "
                f"{row.reason}"
            )
    return tuple(list(row.wall_ms) for row in rows)


def _stand_in(target: Target, settings: QuantizationSettings) -> PackedWeight:
    """A weight of the target's shape, quantized in the fastest way: its numbers do not count."""
    group_size = settings.group_size if settings.scheme == "int4-weight" else None
    weight = torch.randn(target.weight.shape, device=target.weight.device)
    packed = quantize_absmax(weight, settings.scheme, group_size)
    if settings.smooth is not None:
        packed = replace(packed, input_scales=torch.ones(weight.shape[1], device=weight.device))
    return packed if is_read_in_parts(target) else prepare(packed)


def _call(x: Tensor, groups: Sequence[Sequence[Any]], fused: bool) -> Callable[[], list[Tensor]]:
    """Of the layers of the next group every time, as fused layers call theirs or as others do."""
    turn = cycle(groups)
    if fused:
        return lambda: project(x, list(next(turn)))
    return lambda: [layer(x) for layer in next(turn)]
