"""How long a linear layer takes quantized and in the precision it had, at a few numbers of rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastattn.layers import QuantizedLinear
from fastattn.ops import PackedWeight

__all__ = ["REPORT_ROWS", "ROWS", "LayerTimes", "Stopwatch"]

# A token of generation, a short sentence, a batch of sentences.
ROWS = (1, 16, 128)
REPORT_ROWS = 128
# Of both together, a shape and number of rows: enough to tell which is faster, not by how much.
_BUDGET_S = 0.02
_ROUNDS = (3, 40)


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
