"""The attention kernels' forms that are compiled ahead of time: launches over meta tensors, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ._launch import Launch
from .attention_plan import plan_attention, plan_varlen_attention
from .relative_bias_kernel import distances_of, plan_bias_by_distance

__all__ = ["VARIANTS"]

BATCH, HEADS = 2, 8


@dataclass(frozen=True)
class AttentionVariant:
    """One compiled form of the attention kernel.

    Attributes:
        head_dim: size of query, key and value heads.
        dtype: of query, key and value.
        key_heads: heads of key and value, for 8 of query.
        causal: whether there is a diagonal.
        window: whether there is a left edge.
        mask: "none", "padding" [B, Sk] or "full" [B, 1, Sq, Sk].
        bias: whether there is a [1, Hq, Sq, Sk] bias.
        relative: whether there is a relative bias.
        alibi: whether there are ALiBi slopes.
        softcap: whether scores are capped.
        sinks: whether there are sinks.
        dropout: whether weights are dropped.
        varlen: packed sequences instead of a padded batch.
        lengths: whether there are key_lengths.
        queries: queries a sequence.
        keys: keys a sequence; what is not divisible by 16 leaves masks and biases unaligned.
    """

    head_dim: int
    dtype: torch.dtype = torch.float16
    key_heads: int = HEADS
    causal: bool = False
    window: bool = False
    mask: str = "none"
    bias: bool = False
    relative: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    varlen: bool = False
    lengths: bool = False
    queries: int = 1024
    keys: int = 1024

    def launch(self, architecture: str) -> Launch:
        """The launch as the forward functions plan it on `architecture`."""
        empty = partial(torch.empty, device="meta")
        per_head = empty(HEADS)
        terms: dict[str, Any] = dict(
            distance_bias=empty(HEADS, distances_of("t5", 32, 128)) if self.relative else None,
            alibi_slopes=per_head if self.alibi else None,
            sinks=per_head if self.sinks else None,
            softcap=50.0 if self.softcap else 0.0,
            window_left=4096 if self.window else -1,
            causal=self.causal,
            scale=self.head_dim**-0.5,
            dropout_p=0.1 if self.dropout else 0.0,
            seed=empty(1, dtype=torch.int64) if self.dropout else None,
            architecture=architecture,
        )
        if self.varlen:
            tokens = BATCH * self.queries
            query = empty(tokens, HEADS, self.head_dim, dtype=self.dtype)
            key = empty(BATCH * self.keys, self.key_heads, self.head_dim, dtype=self.dtype)
            starts = empty(BATCH + 1, dtype=torch.int32)
            return plan_varlen_attention(
                query=query, key=key, value=key, out=query, lse=empty(HEADS, tokens),
                cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=self.queries, max_seqlen_k=self.keys,
                **terms,
            )  # fmt: skip
        # As models have them: [B, S, H, D] seen as [B, H, S, D].
        query = empty(BATCH, self.queries, HEADS, self.head_dim, dtype=self.dtype).transpose(1, 2)
        key = empty(BATCH, self.keys, self.key_heads, self.head_dim, dtype=self.dtype).transpose(1, 2)
        masks = {"none": None, "padding": (BATCH, self.keys), "full": (BATCH, 1, self.queries, self.keys)}
        shape = masks[self.mask]
        return plan_attention(
            query=query, key=key, value=key, out=query, lse=empty(BATCH, HEADS, self.queries),
            mask=None if shape is None else empty(shape, dtype=torch.bool),
            bias=empty(1, HEADS, self.queries, self.keys, dtype=self.dtype) if self.bias else None,
            key_lengths=empty(BATCH, dtype=torch.int32) if self.lengths else None,
            **terms,
        )  # fmt: skip


# What is compiled at 64 and at 128 wide heads: every feature by itself and what models combine.
FORMS: dict[str, dict[str, Any]] = {
    "fp16": {},
    "fp16-causal": dict(causal=True),
    "fp16-padding": dict(mask="padding"),
    "fp16-padding-causal": dict(mask="padding", causal=True),
    "fp16-padding-causal-unaligned": dict(mask="padding", causal=True, keys=1001),
    "fp16-mask": dict(mask="full"),
    "fp16-bias": dict(bias=True),
    "fp16-relative": dict(relative=True),
    "fp16-alibi": dict(alibi=True),
    "fp16-window": dict(window=True),
    "fp16-softcap": dict(softcap=True),
    "fp16-sinks": dict(sinks=True),
    "fp16-dropout": dict(dropout=True),
    "fp16-lengths": dict(lengths=True),
    "fp16-lengths-causal": dict(lengths=True, causal=True),
    "fp16-grouped-causal": dict(key_heads=2, causal=True),
    "fp16-16queries": dict(queries=16),
    "fp16-varlen": dict(varlen=True),
    "fp16-varlen-causal": dict(varlen=True, causal=True),
    "fp16-varlen-dropout": dict(varlen=True, dropout=True),
    "fp16-varlen-relative": dict(varlen=True, relative=True),
    "fp16-varlen-window": dict(varlen=True, window=True, causal=True),
    "fp16-t5-encoder": dict(relative=True, mask="padding"),
    "fp16-t5-decoder": dict(relative=True, causal=True, mask="padding"),
    "fp16-gemma2": dict(causal=True, window=True, softcap=True, key_heads=4),
    "fp16-gpt_oss": dict(causal=True, window=True, sinks=True, key_heads=1),
    "fp16-bloom": dict(alibi=True, causal=True, mask="padding"),
    "fp16-everything": dict(causal=True, mask="full", bias=True, dropout=True, lengths=True),
    "fp16-everything-unaligned": dict(
        causal=True, mask="full", bias=True, dropout=True, lengths=True, keys=1001
    ),
    "fp16-every_term": dict(
        causal=True, window=True, mask="full", bias=True, relative=True, alibi=True, softcap=True, sinks=True,
        dropout=True, lengths=True,
    ),
    "bf16-padding-causal": dict(dtype=torch.bfloat16, mask="padding", causal=True),
    "bf16-varlen": dict(dtype=torch.bfloat16, varlen=True),
    "bf16-t5-encoder": dict(dtype=torch.bfloat16, relative=True, mask="padding"),
    "bf16-gpt_oss": dict(dtype=torch.bfloat16, causal=True, window=True, sinks=True, key_heads=1),
    "fp32-padding-causal": dict(dtype=torch.float32, mask="padding", causal=True),
    "fp32-gemma2": dict(dtype=torch.float32, causal=True, window=True, softcap=True, key_heads=4),
    "fp32-t5-encoder": dict(dtype=torch.float32, relative=True, mask="padding"),
}  # fmt: skip


def _relative_bias(architecture: str) -> Launch:
    table = torch.empty(32, HEADS, device="meta")
    out = torch.empty(HEADS, distances_of("t5", 32, 128), device="meta")
    return plan_bias_by_distance(table, "t5", 128, 1.0, out)


def _attention_variants() -> dict[str, AttentionVariant]:
    variants = {
        f"attention-d{head_dim}-{name}": AttentionVariant(**{"head_dim": head_dim, **form})
        for head_dim in (64, 128)
        for name, form in FORMS.items()
    }
    plain = AttentionVariant(64)
    variants["attention-d80-fp16-padding"] = replace(plain, head_dim=80, mask="padding")
    variants["attention-d256-fp16-causal"] = replace(plain, head_dim=256, causal=True)
    variants["attention-d256-bf16-gemma2"] = replace(
        plain, head_dim=256, dtype=torch.bfloat16, causal=True, window=True, softcap=True, key_heads=4
    )
    return variants


VARIANTS: dict[str, Callable[[str], Launch]] = {
    **{name: variant.launch for name, variant in _attention_variants().items()},
    "bias_by_distance": _relative_bias,
}
