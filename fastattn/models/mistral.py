"""The Mistral family: Llama's layers under a sliding window."""

from __future__ import annotations

from transformers.models.mistral import modeling_mistral

from fastattn.layers import FusedGatedMLP, FusedRMSNorm
from fastattn.models.decoder import PreNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class MistralRMSNorm(FusedRMSNorm, modeling_mistral.MistralRMSNorm):
    fastattn_original = modeling_mistral.MistralRMSNorm


class MistralMLP(FusedGatedMLP, modeling_mistral.MistralMLP):
    fastattn_original = modeling_mistral.MistralMLP


class MistralDecoderLayer(PreNormDecoderLayer, modeling_mistral.MistralDecoderLayer):
    fastattn_original = modeling_mistral.MistralDecoderLayer


FAMILY = Family(
    name="mistral",
    attention="rotary positions, grouped queries, sliding window",
    sites=(
        Site("norm", MistralRMSNorm),
        Site("activation", MistralMLP),
        Site("residual_norm", MistralDecoderLayer),
    ),
)
