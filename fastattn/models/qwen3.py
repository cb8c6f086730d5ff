"""The Qwen3 family: Llama's layers with a norm on every query and key."""

from __future__ import annotations

from transformers.models.qwen3 import modeling_qwen3

from fastattn.layers import FusedGatedMLP, FusedRMSNorm
from fastattn.models.decoder import PreNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class Qwen3RMSNorm(FusedRMSNorm, modeling_qwen3.Qwen3RMSNorm):
    fastattn_original = modeling_qwen3.Qwen3RMSNorm


class Qwen3MLP(FusedGatedMLP, modeling_qwen3.Qwen3MLP):
    fastattn_original = modeling_qwen3.Qwen3MLP


class Qwen3DecoderLayer(PreNormDecoderLayer, modeling_qwen3.Qwen3DecoderLayer):
    fastattn_original = modeling_qwen3.Qwen3DecoderLayer


FAMILY = Family(
    name="qwen3",
    attention="rotary positions, grouped queries, normalized queries and keys, sliding window in some layers",
    sites=(
        Site("norm", Qwen3RMSNorm),
        Site("activation", Qwen3MLP),
        Site("residual_norm", Qwen3DecoderLayer),
    ),
)
