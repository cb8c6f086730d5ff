"""The mBART family: learned positions, pre-norm layers, cross-attention."""

from __future__ import annotations

from transformers.models.mbart import modeling_mbart

from fastattn.models.encoder_decoder import (
    LayerNorm,
    PreNormCrossDecoderLayer,
    PreNormEncoderLayer,
)
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion

__all__ = ["FAMILY"]


class MBartEncoderLayer(PackedRegion, PreNormEncoderLayer, modeling_mbart.MBartEncoderLayer):
    fastattn_original = modeling_mbart.MBartEncoderLayer


class MBartDecoderLayer(PreNormCrossDecoderLayer, modeling_mbart.MBartDecoderLayer):
    fastattn_original = modeling_mbart.MBartDecoderLayer


FAMILY = Family(
    name="mbart",
    attention="absolute positions, cross-attention",
    sites=(
        Site("encoder", MBartEncoderLayer),
        Site("residual_norm", MBartDecoderLayer),
        Site("norm", LayerNorm, name="encoder.layer_norm"),
    ),
)
