"""What `tune` runs: one workload for each launch choice worth measuring, with sizes that fill a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import activation_config, attention_config, decode_config, norm_config, rotary_config
from .activation import gated_activation_forward
from .attention import attention_forward
from .decode import decode_attention_forward
from .norm import add_layer_norm_forward
from .rotary import rotary_forward
from .softmax import softmax_forward

__all__ = ["WORKLOADS", "Workload"]

HALF = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """One call of one operation.

    Attributes:
        name: for the reader.
        op: as `tuned_choice` is asked for it.
        prepare: makes the inputs on a device and gives the call.
        candidates: the configurations to measure on an architecture.
    """

    name: str
    op: str
    prepare: Callable[[torch.device], Callable[[], Any]]
    candidates: Callable[[str], Iterable[Any]]


def norm(device: torch.device, width: int, dtype: torch.dtype, elements: int) -> Callable[[], Any]:
    x, residual = (torch.randn(elements // width, width, dtype=dtype, device=device) for _ in range(2))
    weight, bias = (torch.randn(width, dtype=dtype, device=device) for _ in range(2))
    return lambda: add_layer_norm_forward(x, residual, weight, bias, 1e-5, 0.0, None)


def softmax(device: torch.device, width: int, dtype: torch.dtype, elements: int) -> Callable[[], Any]:
    x = torch.randn(elements // width, width, dtype=dtype, device=device)
    return lambda: softmax_forward(x, None, 0.125, False)


def gated(device: torch.device, width: int, elements: int) -> Callable[[], Any]:
    gate, up = torch.randn(elements // width, 2 * width, dtype=HALF, device=device).chunk(2, -1)
    return lambda: gated_activation_forward(gate, up, "silu")


def rotary(device: torch.device, heads: int, size: int, positions: int) -> Callable[[], Any]:
    query, key = (
        torch.randn(2, positions, each, size, dtype=HALF, device=device).transpose(1, 2)
        for each in (heads, max(heads // 4, 1))
    )
    angles = torch.randn(positions, size // 2, device=device)
    cos, sin = (torch.cat([x, x], -1).to(HALF) for x in (angles.cos(), angles.sin()))
    return lambda: rotary_forward(query, key, cos, sin, False)


def attention(
    device: torch.device,
    size: int,
    dtype: torch.dtype,
    crowded: bool,
    queries: int,
    keys: int,
    batch: int = 2,
) -> Callable[[], Any]:
    """`crowded` by a mask a query, as `choose_attention_config` has it."""
    heads = 16
    query, key, value = (
        torch.randn(batch, length, heads, size, dtype=dtype, device=device).transpose(1, 2)
        for length in (queries, keys, keys)
    )
    mask = torch.rand(batch, 1, queries, keys, device=device) < 0.9 if crowded else None
    return partial(
        attention_forward,
        query=query,
        key=key,
        value=value,
        mask=mask,
        query_start=keys - queries,
        scale=size**-0.5,
    )


def decode(
    device: torch.device,
    size: int,
    cache_dtype: torch.dtype,
    block_size: int,
    group: int,
    positions: int,
    dtype: torch.dtype = HALF,
) -> Callable[[], Any]:
    batch, key_heads = 8, 8
    shape = (batch, key_heads, positions, size)
    if block_size:
        shape = (batch * positions // block_size, block_size, key_heads, size)
    caches = [torch.randn(shape, device=device) for _ in range(2)]
    scales = None
    if cache_dtype.itemsize == 1:
        scales = torch.full((key_heads,), 1 / 25, device=device)
        caches = [(cache * 25).clamp(-127, 127) for cache in caches]
    key, value = (cache.to(cache_dtype) for cache in caches)
    pages = None
    if block_size:
        pages = torch.randperm(shape[0], device=device).int().view(batch, -1)
    return partial(
        decode_attention_forward,
        query=torch.randn(batch, key_heads * group, 1, size, dtype=dtype, device=device),
        key_cache=key,
        value_cache=value,
        cache_lengths=torch.full((batch,), positions, dtype=torch.int32, device=device),
        block_table=pages,
        key_scale=scales,
        value_scale=scales,
        rel_table=None,
        rel_kind="",
        rel_max_distance=0,
        alibi_slopes=None,
        window_left=-1,
        scale=size**-0.5,
        softcap=0.0,
        sinks=None,
        return_lse=False,
    )


def _norms() -> Iterable[Workload]:
    for width in (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        for dtype in (HALF, torch.float32):
            candidates = _anywhere(norm_config.candidates, width, dtype.itemsize)
            name = f"{width}-{str(dtype)[6:]}"
            for op, make in (("norm", norm), ("softmax", softmax)):
                prepare = partial(make, width=width, dtype=dtype, elements=2**26)
                yield Workload(f"{op}-{name}", op, prepare, candidates)


def _anywhere(candidates: Callable[..., Iterable[Any]], *arguments: Any) -> Callable[[str], Iterable[Any]]:
    """Candidates that are the same on all architectures."""
    return lambda architecture: candidates(*arguments)


def _pointwise() -> Iterable[Workload]:
    for width in (64, 512, 1024, 4096, 8192, 16384):
        candidates = _anywhere(activation_config.candidates, width)
        prepare = partial(gated, width=width, elements=2**26)
        yield Workload(f"gated_activation-{width}", "pointwise", prepare, candidates)
    for heads, size in ((8, 64), (12, 64), (32, 64), (8, 128), (32, 128), (64, 128), (16, 256)):
        candidates = _anywhere(rotary_config.candidates, heads, size)
        prepare = partial(rotary, heads=heads, size=size, positions=8192)
        yield Workload(f"rotary-{heads}x{size}", "rotary", prepare, candidates)


def _attentions() -> Iterable[Workload]:
    for size in (64, 128, 256):
        for dtype in (HALF, torch.float16):
            for crowded, queries in ((False, 4096), (True, 4096), (False, 16)):
                form = "mask" if crowded else f"{queries}queries"
                prepare = partial(
                    attention, size=size, dtype=dtype, crowded=crowded, queries=queries, keys=4096
                )
                # Contiguous heads of these sizes are what tensor descriptors can describe.
                candidates = _anywhere(attention_config.candidates, size, dtype, min(queries, 128), True)
                yield Workload(f"attention-{size}-{str(dtype)[6:]}-{form}", "attention", prepare, candidates)


def _decodes() -> Iterable[Workload]:
    for size in (64, 128, 256):
        for cache_dtype in (HALF, torch.int8, torch.float8_e4m3fn):
            for block_size in (0, 16):
                for group in (4, 32):
                    name = (
                        f"decode-{size}-{str(cache_dtype)[6:]}-{'paged' if block_size else 'dense'}-{group}"
                    )
                    prepare = partial(
                        decode, size=size, cache_dtype=cache_dtype, block_size=block_size, group=group,
                        positions=8192,
                    )  # fmt: skip
                    candidates = partial(
                        decode_config.candidates, size, HALF, cache_dtype, bool(block_size), rows=group
                    )
                    yield Workload(name, "decode_attention", prepare, candidates)


WORKLOADS: tuple[Workload, ...] = (*_attentions(), *_decodes(), *_norms(), *_pointwise())
