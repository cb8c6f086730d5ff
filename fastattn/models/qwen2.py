"""The Qwen2 family: Llama's layers, some of them under a sliding window."""

from __future__ import annotations

from transformers.models.qwen2 import modeling_qwen2

from fastattn.layers import FusedGatedMLP, FusedRMSNorm
from fastattn.models.decoder import PreNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class Qwen2RMSNorm(FusedRMSNorm, modeling_qwen2.Qwen2RMSNorm):
    fastattn_original = modeling_qwen2.Qwen2RMSNorm


class Qwen2MLP(FusedGatedMLP, modeling_qwen2.Qwen2MLP):
    fastattn_original = modeling_qwen2.Qwen2MLP


class Qwen2DecoderLayer(PreNormDecoderLayer, modeling_qwen2.Qwen2DecoderLayer):
    fastattn_original = modeling_qwen2.Qwen2DecoderLayer


FAMILY = Family(
    name="qwen2",
    attention="rotary positions, grouped queries, sliding window in some layers",
    sites=(
        Site("norm", Qwen2RMSNorm),
        Site("activation", Qwen2MLP),
        Site("residual_norm", Qwen2DecoderLayer),
    ),
)
