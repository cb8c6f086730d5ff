"""The Marian family: sinusoidal positions, post-norm layers, cross-attention."""

from __future__ import annotations

from transformers.models.marian import modeling_marian

from fastattn.models.encoder_decoder import PostNormDecoderLayer, PostNormEncoderLayer
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion

__all__ = ["FAMILY"]


class MarianEncoderLayer(PackedRegion, PostNormEncoderLayer, modeling_marian.MarianEncoderLayer):
    fastattn_original = modeling_marian.MarianEncoderLayer


class MarianDecoderLayer(PostNormDecoderLayer, modeling_marian.MarianDecoderLayer):
    fastattn_original = modeling_marian.MarianDecoderLayer


FAMILY = Family(
    name="marian",
    attention="sinusoidal positions, cross-attention",
    sites=(Site("encoder", MarianEncoderLayer), Site("residual_norm", MarianDecoderLayer)),
)
