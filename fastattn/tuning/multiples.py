"""Whether linears gain from a number of tokens that is a multiple of 8, 16 or 32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, pad

from fastattn.bench.timing import Contender
from fastattn.tuning.trials import Trials, fastest

__all__ = ["MULTIPLES", "measure_multiple"]

MULTIPLES = (8, 16, 32)
# Odd, and not just below a multiple: rounding up to 32 adds 2%.
_TOKENS = 1003
_WIDTH, _FFN = 768, 3072
# Padding every batch by more tokens has to gain more than the noise.
_WORTH = 1.03


def measure_multiple(trials: Trials, budget_s: float) -> int:
    """What to round the number of tokens up to: 1 where no multiple is surely faster than the odd number."""
    generator = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(*shape, generator=generator).to(trials.device, trials.dtype)
        for shape in ((_TOKENS, _WIDTH), (_FFN, _WIDTH), (_WIDTH, _FFN))
    )
    # In bf16 an exact GELU of wide inputs saturates: keep them near one.
    up, down = up * _WIDTH**-0.5, down * _FFN**-0.5
    contenders = [Contender(_name(multiple), _block(x, up, down, multiple)) for multiple in (1, *MULTIPLES)]
    rows = trials.ask(
        "multiple",
        f"a feed-forward block, {_TOKENS:,} tokens",
        contenders,
        lambda rows: fastest(rows, _WORTH).name,
        budget_s,
    )
    return (1, *MULTIPLES)[rows.index(fastest(rows, _WORTH))]


def _block(x: Tensor, up: Tensor, down: Tensor, multiple: int) -> Callable[[], Tensor]:
    """The feed-forward block on `x` with as many rows of zeros as make a multiple."""
    rounded = pad(x, (0, 0, 0, -_TOKENS % multiple))
    return lambda: linear(gelu(linear(rounded, up)), down)[:_TOKENS]


def _name(multiple: int) -> str:
    return "as they come" if multiple == 1 else f"multiple of {multiple}"
