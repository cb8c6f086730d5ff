"""The kernel variants that are compiled ahead of time: launches over meta tensors, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from ._launch import Launch
from .activation import plan_bias_gelu
from .attention import plan_attention, plan_varlen_attention
from .norm import plan_add_layer_norm

__all__ = ["VARIANTS"]

BATCH, HEADS = 2, 8


@dataclass(frozen=True)
class AttentionVariant:
    """One compiled form of the attention kernel.

    Attributes:
        head_dim: size of query, key and value heads.
        dtype: of query, key and value.
        causal: whether the diagonal is compiled in.
        mask: "none", "padding" [B, Sk] or "full" [B, 1, Sq, Sk].
        bias: whether there is a [1, Hq, Sq, Sk] bias.
        dropout: whether weights are dropped.
        varlen: packed sequences instead of a padded batch.
        lengths: whether there are key_lengths.
        queries: queries a sequence.
        keys: keys a sequence; what is not divisible by 16 leaves masks and biases unaligned.
    """

    head_dim: int
    dtype: torch.dtype = torch.float16
    causal: bool = False
    mask: str = "none"
    bias: bool = False
    dropout: bool = False
    varlen: bool = False
    lengths: bool = False
    queries: int = 1024
    keys: int = 1024

    def launch(self, architecture: str) -> Launch:
        """The launch as the forward functions plan it on `architecture`."""
        empty = partial(torch.empty, device="meta")
        probability = 0.1 if self.dropout else 0.0
        seed = empty(1, dtype=torch.int64) if self.dropout else None
        scale = self.head_dim**-0.5
        if self.varlen:
            tokens = BATCH * self.queries
            query = empty(tokens, HEADS, self.head_dim, dtype=self.dtype)
            starts = empty(BATCH + 1, dtype=torch.int32)
            return plan_varlen_attention(
                query, query, query, query, empty(HEADS, tokens), starts, starts, self.queries, self.keys,
                self.causal, 0, None, True, scale, probability, seed, architecture,
            )  # fmt: skip
        # As models have them: [B, S, H, D] seen as [B, H, S, D].
        query = empty(BATCH, self.queries, HEADS, self.head_dim, dtype=self.dtype).transpose(1, 2)
        key = empty(BATCH, self.keys, HEADS, self.head_dim, dtype=self.dtype).transpose(1, 2)
        masks = {"none": None, "padding": (BATCH, self.keys), "full": (BATCH, 1, self.queries, self.keys)}
        shape = masks[self.mask]
        return plan_attention(
            query, key, key, query, empty(BATCH, HEADS, self.queries),
            None if shape is None else empty(shape, dtype=torch.bool),
            empty(1, HEADS, self.queries, self.keys, dtype=self.dtype) if self.bias else None,
            empty(BATCH, dtype=torch.int32) if self.lengths else None,
            self.causal, 0, None, scale, probability, seed, architecture,
        )  # fmt: skip


def _norm(width: int, dtype: torch.dtype, dropout: bool, architecture: str) -> Launch:
    x, weight = (
        torch.empty(64, width, dtype=dtype, device="meta"),
        torch.empty(width, dtype=dtype, device="meta"),
    )
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    return plan_add_layer_norm(x, x, weight, weight, x, x, 1e-5, 0.1 if dropout else 0.0, seed)


def _gelu(approximate: str, architecture: str) -> Launch:
    x, bias = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((64, 3072), (3072,)))
    return plan_bias_gelu(x, bias, x, approximate)


def _attention_variants() -> dict[str, AttentionVariant]:
    variants = {}
    for head_dim in (64, 128):
        plain = AttentionVariant(head_dim)
        name = f"attention-d{head_dim}"
        for causal in (False, True):
            suffix = "-causal" if causal else ""
            variant = replace(plain, causal=causal)
            variants[f"{name}-fp16{suffix}"] = variant
            variants[f"{name}-fp16-padding{suffix}"] = replace(variant, mask="padding")
            variants[f"{name}-fp16-varlen{suffix}"] = replace(variant, varlen=True)
        variants[f"{name}-fp16-varlen-dropout"] = replace(plain, varlen=True, dropout=True)
        variants[f"{name}-fp16-lengths-causal"] = replace(plain, lengths=True, causal=True)
        everything = replace(plain, causal=True, mask="full", bias=True, dropout=True, lengths=True)
        variants[f"{name}-fp16-everything"] = everything
        variants[f"{name}-fp16-everything-unaligned"] = replace(everything, keys=1001)
        variants[f"{name}-fp16-padding-causal-unaligned"] = replace(
            plain, causal=True, mask="padding", keys=1001
        )
        variants[f"{name}-bf16-padding-causal"] = replace(
            plain, dtype=torch.bfloat16, mask="padding", causal=True
        )
        variants[f"{name}-bf16-varlen"] = replace(plain, dtype=torch.bfloat16, varlen=True)
        variants[f"{name}-fp32-padding-causal"] = replace(
            plain, dtype=torch.float32, mask="padding", causal=True
        )
        variants[f"{name}-fp16-16queries"] = replace(plain, queries=16)
    variants["attention-d256-fp16-causal"] = AttentionVariant(256, causal=True)
    variants["attention-d80-fp16-padding"] = AttentionVariant(80, mask="padding")
    return variants


VARIANTS: dict[str, Callable[[str], Launch]] = {
    **{name: variant.launch for name, variant in _attention_variants().items()},
    "add_layer_norm-768-fp16": partial(_norm, 768, torch.float16, False),
    "add_layer_norm-8192-fp32-dropout": partial(_norm, 8192, torch.float32, True),
    "add_layer_norm-65536-bf16": partial(_norm, 65536, torch.bfloat16, False),
    "bias_gelu-none": partial(_gelu, "none"),
    "bias_gelu-tanh": partial(_gelu, "tanh"),
}
