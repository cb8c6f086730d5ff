"""The Gemma 3 family, alone or as the text part of the multimodal model: norms before and after each part of
a layer, and on every query and key; most layers under a sliding window.
"""

from __future__ import annotations

from transformers.models.gemma3 import modeling_gemma3

from fastattn.layers import FusedGatedMLP, FusedRMSNorm
from fastattn.models.decoder import SandwichNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class Gemma3RMSNorm(FusedRMSNorm, modeling_gemma3.Gemma3RMSNorm):
    fastattn_original = modeling_gemma3.Gemma3RMSNorm
    eps_name = "eps"
    norm_offset = 1.0


class Gemma3MLP(FusedGatedMLP, modeling_gemma3.Gemma3MLP):
    fastattn_original = modeling_gemma3.Gemma3MLP


class Gemma3DecoderLayer(SandwichNormDecoderLayer, modeling_gemma3.Gemma3DecoderLayer):
    fastattn_original = modeling_gemma3.Gemma3DecoderLayer


FAMILY = Family(
    name="gemma3",
    attention="rotary positions, grouped queries, normalized queries and keys, sliding window in some layers",
    sites=(
        Site("norm", Gemma3RMSNorm),
        Site("activation", Gemma3MLP),
        Site("residual_norm", Gemma3DecoderLayer),
    ),
)
