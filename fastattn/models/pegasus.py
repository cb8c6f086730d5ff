"""The Pegasus family: sinusoidal positions, pre-norm layers, cross-attention."""

from __future__ import annotations

from transformers.models.pegasus import modeling_pegasus

from fastattn.models.encoder_decoder import (
    LayerNorm,
    PreNormCrossDecoderLayer,
    PreNormEncoderLayer,
)
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion

__all__ = ["FAMILY"]


class PegasusEncoderLayer(PackedRegion, PreNormEncoderLayer, modeling_pegasus.PegasusEncoderLayer):
    fastattn_original = modeling_pegasus.PegasusEncoderLayer


class PegasusDecoderLayer(PreNormCrossDecoderLayer, modeling_pegasus.PegasusDecoderLayer):
    fastattn_original = modeling_pegasus.PegasusDecoderLayer


FAMILY = Family(
    name="pegasus",
    attention="sinusoidal positions, cross-attention",
    sites=(
        Site("encoder", PegasusEncoderLayer),
        Site("residual_norm", PegasusDecoderLayer),
        Site("norm", LayerNorm, name="encoder.layer_norm"),
    ),
)
