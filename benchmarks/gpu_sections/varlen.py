"""Packed attention against the padded batch it replaces, and against PyTorch's own packed kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_exact
import torch
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from fastattn.bench import Contender, MissingError
from gpu_sections.attention import BACKENDS, sdpa
from gpu_sections.record import Record
from gpu_sections.timing import DEVICE, OURS, Answer, Case, run_cases


def lengths_case(name: str, low: int, high: int, batch: int, heads: int, head_dim: int, causal: bool) -> Case:
    """Sequences of evenly spread lengths in random order."""
    spread = torch.linspace(low, high, batch).long()
    lengths = spread[torch.randperm(batch, generator=torch.Generator().manual_seed(0))].to(DEVICE)
    mask = torch.arange(high, device=DEVICE) < lengths[:, None]
    padded = [
        torch.randn(batch, high, heads, head_dim, dtype=torch.bfloat16, device=DEVICE) for _ in range(3)
    ]
    packed = [x[mask] for x in padded]
    wide = [x.transpose(1, 2) for x in padded]
    starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
    keep = mask[:, None, None]
    if causal:
        keep = keep & torch.ones(high, high, dtype=torch.bool, device=DEVICE).tril()
    keep_rows = keep.expand(batch, 1, high, high).contiguous()

    def pytorch_packed() -> Callable[[], Any]:
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError as error:
            raise MissingError(str(error)) from None
        if causal:
            raise MissingError("its causal argument changed between versions")
        return lambda: varlen_attn(*packed, starts, starts, high, high)

    contenders = [
        Contender(
            OURS,
            lambda: ops.varlen_attention(*packed, starts, starts, high, high, causal=causal),
            highlight=True,
        ),
        Contender("SDPA, padded, mask", partial(functional.scaled_dot_product_attention, *wide, keep_rows)),
        Contender(
            "SDPA efficient, padded, mask", partial(sdpa, BACKENDS["SDPA efficient"], wide, attn_mask=keep)
        ),
        # What reads padding as if it were text: wrong on padded rows, and still what packing has to beat.
        Contender(
            "SDPA flash, padded, no mask", partial(sdpa, BACKENDS["SDPA flash"], wide, is_causal=causal)
        ),
        Contender("PyTorch varlen_attn", prepare=pytorch_packed),
    ]
    # The longest sequence: all padded contenders have it whole.
    longest = int(lengths.argmax())
    rows = slice(int(starts[longest]), int(starts[longest + 1]))
    query, key, value = (x[longest : longest + 1, -1:] for x in wide)
    exact, own = (
        gpu_exact.attention(query, key, value, dtype, causal=causal)[0][0, 0]
        for dtype in (torch.float64, query.dtype)
    )

    def pick_padded(out: Tensor) -> Tensor:
        return out[longest, -1]

    answers: dict[str, Answer | None] = {"": Answer(pick_padded, exact, own)}
    for each in (OURS, "PyTorch varlen_attn"):
        answers[each] = Answer(lambda out: out[rows, -1], exact, own)
    real = 4.0 * heads * head_dim * float((lengths.double() ** 2).sum()) * (0.5 if causal else 1.0)
    return Case(name, contenders, ["SDPA, padded, mask", "SDPA efficient, padded, mask"], answers, flops=real)


CASES: dict[str, Callable[[str], Case]] = {
    "varlen-32-to-512": partial(
        lengths_case, low=32, high=512, batch=128, heads=12, head_dim=64, causal=False
    ),
    "varlen-32-to-512-causal": partial(
        lengths_case, low=32, high=512, batch=128, heads=16, head_dim=128, causal=True
    ),
    "varlen-256-to-4096": partial(
        lengths_case, low=256, high=4096, batch=8, heads=16, head_dim=64, causal=False
    ),
    "varlen-all-512": partial(lengths_case, low=512, high=512, batch=64, heads=12, head_dim=64, causal=False),
}


def run(record: Record, device: torch.device) -> None:
    """The section."""
    run_cases(record, [(name, partial(make, name)) for name, make in CASES.items()])
