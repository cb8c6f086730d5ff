"""The Llama family: rotary positions, grouped queries, RMS norms, gated MLP."""

from __future__ import annotations

from transformers.models.llama import modeling_llama

from fastattn.layers import FusedGatedMLP, FusedRMSNorm
from fastattn.models.decoder import PreNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class LlamaRMSNorm(FusedRMSNorm, modeling_llama.LlamaRMSNorm):
    fastattn_original = modeling_llama.LlamaRMSNorm


class LlamaMLP(FusedGatedMLP, modeling_llama.LlamaMLP):
    fastattn_original = modeling_llama.LlamaMLP


class LlamaDecoderLayer(PreNormDecoderLayer, modeling_llama.LlamaDecoderLayer):
    fastattn_original = modeling_llama.LlamaDecoderLayer


FAMILY = Family(
    name="llama",
    attention="rotary positions, grouped queries",
    sites=(
        Site("norm", LlamaRMSNorm),
        Site("activation", LlamaMLP),
        Site("residual_norm", LlamaDecoderLayer),
    ),
)
