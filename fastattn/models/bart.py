"""The BART family: learned positions, post-norm layers, cross-attention."""

from __future__ import annotations

from transformers.models.bart import modeling_bart

from fastattn.models.encoder_decoder import PostNormDecoderLayer, PostNormEncoderLayer
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion

__all__ = ["FAMILY"]


class BartEncoderLayer(PackedRegion, PostNormEncoderLayer, modeling_bart.BartEncoderLayer):
    fastattn_original = modeling_bart.BartEncoderLayer


class BartDecoderLayer(PostNormDecoderLayer, modeling_bart.BartDecoderLayer):
    fastattn_original = modeling_bart.BartDecoderLayer


FAMILY = Family(
    name="bart",
    attention="absolute positions, cross-attention",
    sites=(Site("encoder", BartEncoderLayer), Site("residual_norm", BartDecoderLayer)),
)
