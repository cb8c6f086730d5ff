"""The decode kernels' forms compiled ahead of time: launches over meta tensors, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ._launch import Launch
from .decode import plan_decode_attention

__all__ = ["VARIANTS"]

BATCH, KEY_HEADS, KEYS = 2, 8, 8192


@dataclass(frozen=True)
class DecodeVariant:
    """One compiled form of the decode kernel.

    Attributes:
        head_dim: size of query, key and value heads.
        dtype: of query, and of the caches where `cache_dtype` is None.
        cache_dtype: int8 or float8_e4m3fn.
        block_size: keys a page; 0 is a contiguous cache.
        queries: new tokens a sequence.
        group: query heads a key head.
        window, softcap, sinks, alibi, relative_bias: whether scores have them.
        splits: programs a sequence's keys are divided among; 1 leaves no reduction.
        reduction: the reduction's launch instead of the kernel's.
    """

    head_dim: int
    dtype: torch.dtype = torch.float16
    cache_dtype: torch.dtype | None = None
    block_size: int = 0
    queries: int = 1
    group: int = 4
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    alibi: bool = False
    relative_bias: bool = False
    splits: int = 16
    reduction: bool = False

    def launch(self, architecture: str) -> Launch:
        """The launch as `decode_attention_forward` plans it on `architecture`."""
        empty = partial(torch.empty, device="meta")
        heads = KEY_HEADS * self.group
        query = empty(BATCH, self.queries, heads, self.head_dim, dtype=self.dtype).transpose(1, 2)
        table, shape = None, (BATCH, KEY_HEADS, KEYS, self.head_dim)
        if self.block_size:
            pages = KEYS // self.block_size
            shape = (BATCH * pages, self.block_size, KEY_HEADS, self.head_dim)
            table = empty(BATCH, pages, dtype=torch.int32)
        cache = empty(shape, dtype=self.cache_dtype or self.dtype)
        scales = None if self.cache_dtype is None else empty(KEY_HEADS)
        launches = plan_decode_attention(
            query,
            cache,
            cache,
            query,
            empty(BATCH, heads, self.queries),
            empty(BATCH, dtype=torch.int32),
            table,
            key_scale=scales,
            value_scale=scales,
            rel_table=empty(32, heads) if self.relative_bias else None,
            rel_max_distance=128,
            alibi_slopes=empty(heads) if self.alibi else None,
            window_left=1024 if self.window else -1,
            scale=self.head_dim**-0.5,
            softcap=50.0 if self.softcap else 0.0,
            sinks=empty(heads) if self.sinks else None,
            architecture=architecture,
            num_splits=self.splits,
        )
        return launches[-1 if self.reduction else 0]


def _variants() -> dict[str, DecodeVariant]:
    variants = {}
    for head_dim in (64, 128, 256):
        plain, name = DecodeVariant(head_dim), f"decode-d{head_dim}"
        variants[f"{name}-fp16"] = plain
        variants[f"{name}-fp16-paged16"] = replace(plain, block_size=16)
        variants[f"{name}-fp16-paged128"] = replace(plain, block_size=128)
        variants[f"{name}-fp16-window-softcap"] = replace(plain, window=True, softcap=True)
        variants[f"{name}-fp16-reduction"] = replace(plain, sinks=True, reduction=True)
        variants[f"{name}-bf16"] = replace(plain, dtype=torch.bfloat16)
        for suffix, cache_dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
            for dtype in (torch.float16, torch.bfloat16):
                half = "fp16" if dtype == torch.float16 else "bf16"
                variant = replace(plain, dtype=dtype, cache_dtype=cache_dtype)
                variants[f"{name}-{half}-{suffix}"] = variant
        variants[f"{name}-fp16-int8-paged16"] = replace(plain, cache_dtype=torch.int8, block_size=16)
    for head_dim in (64, 128):
        plain, name = DecodeVariant(head_dim), f"decode-d{head_dim}"
        variants[f"{name}-fp16-sinks-unsplit"] = replace(plain, sinks=True, splits=1)
        variants[f"{name}-fp16-rows64"] = replace(plain, queries=8, group=8)
        variants[f"{name}-fp16-alibi"] = replace(plain, alibi=True)
        variants[f"{name}-fp16-relative_bias"] = replace(plain, relative_bias=True)
        variants[f"{name}-fp32"] = replace(plain, dtype=torch.float32)
        variants[f"{name}-bf16-fp8-paged16-rows64-window-softcap-sinks"] = replace(
            plain, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, block_size=16, queries=8, group=8,
            window=True, softcap=True, sinks=True, splits=1,
        )  # fmt: skip
    variants["decode-d80-fp16-paged16"] = DecodeVariant(80, block_size=16)
    return variants


VARIANTS: dict[str, Callable[[str], Launch]] = {name: variant.launch for name, variant in _variants().items()}
