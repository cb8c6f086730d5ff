"""The Gemma 2 family: norms before and after each part of a layer, soft-capped scores, every other layer
under a sliding window.
"""

from __future__ import annotations

from transformers.models.gemma2 import modeling_gemma2

from fastattn.layers import FusedGatedMLP, FusedRMSNorm
from fastattn.models.decoder import SandwichNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class Gemma2RMSNorm(FusedRMSNorm, modeling_gemma2.Gemma2RMSNorm):
    fastattn_original = modeling_gemma2.Gemma2RMSNorm
    eps_name = "eps"
    norm_offset = 1.0


class Gemma2MLP(FusedGatedMLP, modeling_gemma2.Gemma2MLP):
    fastattn_original = modeling_gemma2.Gemma2MLP


class Gemma2DecoderLayer(SandwichNormDecoderLayer, modeling_gemma2.Gemma2DecoderLayer):
    fastattn_original = modeling_gemma2.Gemma2DecoderLayer


FAMILY = Family(
    name="gemma2",
    attention="rotary positions, grouped queries, soft-capped scores, sliding window in some layers",
    sites=(
        Site("norm", Gemma2RMSNorm),
        Site("activation", Gemma2MLP),
        Site("residual_norm", Gemma2DecoderLayer),
    ),
)
