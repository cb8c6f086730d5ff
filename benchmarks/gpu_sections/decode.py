"""Decode attention against SDPA over the same cache, and against the memory bandwidth it cannot exceed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gpu_exact
import torch
from torch import Tensor
from torch.nn import functional

from fastattn import ops
from fastattn.bench import Contender
from gpu_sections.record import Record
from gpu_sections.timing import DEVICE, OURS, Answer, Case, run_cases

HEADS, CACHE_HEADS, HEAD_DIM = 32, 8, 128


def decode_case(name: str, batch: int, positions: int, kind: str = "bf16", block_size: int = 0) -> Case:
    """One new token a sequence over full caches of 8 heads of 128, 32 query heads."""
    query = torch.randn(batch, HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
    shape = (batch, CACHE_HEADS, positions, HEAD_DIM)
    caches = [torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    named: dict[str, Any] = {}
    if kind != "bf16":
        limit, stored = {"int8": (127.0, torch.int8), "fp8": (448.0, torch.float8_e4m3fn)}[kind]
        scale = 4.5 / limit
        scaled = [(x.float().clamp(-4.5, 4.5) / scale) for x in caches]
        caches = [(x.round() if kind == "int8" else x).to(stored) for x in scaled]
        scales = torch.full((CACHE_HEADS,), scale, device=DEVICE)
        named = {"key_scale": scales, "value_scale": scales}
        plain = [(x.float() * scale).bfloat16() for x in caches]
    else:
        plain = caches
    lengths = torch.full((batch,), positions, dtype=torch.int32, device=DEVICE)
    moved = 2 * batch * CACHE_HEADS * positions * HEAD_DIM * caches[0].element_size()
    given, table = caches, None
    if block_size:
        count = positions // block_size
        order = torch.randperm(batch * count, device=DEVICE)
        given = [_paged(x, block_size, order) for x in caches]
        table = order.int().view(batch, count)
    contenders = [
        Contender(OURS, lambda: ops.decode_attention(query, *given, lengths, table, **named), highlight=True),
        Contender("SDPA", partial(functional.scaled_dot_product_attention, query, *plain, enable_gqa=True)),
        Contender("copy, same bytes", _copy(moved)),
    ]
    last = (query[-1:, -1:], *(x[-1:, -1:] for x in plain))
    if kind != "bf16":
        last = (last[0], *((x[-1:, -1:].float() * scale) for x in caches))
    exact, own = (gpu_exact.attention(*last, dtype)[0] for dtype in (torch.float64, query.dtype))
    answers: dict[str, Answer | None] = {
        "": Answer(lambda out: out[-1:, -1:], exact, own),
        "copy, same bytes": None,
    }
    return Case(name, contenders, ["SDPA"], answers, moved_bytes=moved)


def _paged(cache: Tensor, block_size: int, order: Tensor) -> Tensor:
    """[B, H, S, D] as pages [blocks, block_size, H, D], the i-th at `order[i]`."""
    batch, heads, positions, size = cache.shape
    blocks = cache.view(batch, heads, positions // block_size, block_size, size).permute(0, 2, 3, 1, 4)
    pages = torch.empty_like(blocks.flatten(0, 1), memory_format=torch.contiguous_format)
    # Indexing of fp8 and int8 alike, as bytes.
    pages.view(torch.int8)[order] = blocks.flatten(0, 1).contiguous().view(torch.int8)
    return pages


def _copy(moved: int) -> Callable[[], Tensor]:
    """A copy that reads and writes `moved` bytes together."""
    source = torch.randint(256, (moved // 2,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


CASES: dict[str, Callable[[str], Case]] = {
    "decode-16k": partial(decode_case, batch=16, positions=16384),
    "decode-64k": partial(decode_case, batch=4, positions=65536),
    "decode-paged16-16k": partial(decode_case, batch=16, positions=16384, block_size=16),
    "decode-paged256-16k": partial(decode_case, batch=16, positions=16384, block_size=256),
    "decode-int8-16k": partial(decode_case, batch=32, positions=16384, kind="int8"),
    "decode-fp8-16k": partial(decode_case, batch=32, positions=16384, kind="fp8"),
    "decode-batch1-128k": partial(decode_case, batch=1, positions=131072),
    "decode-batch1-1k": partial(decode_case, batch=1, positions=1024),
}


def run(record: Record, device: torch.device) -> None:
    """The section."""
    run_cases(record, [(name, partial(make, name)) for name, make in CASES.items()], rounds_s=1.0)
