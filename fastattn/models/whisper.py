"""The Whisper family: sound of one length through convolutions, sinusoidal and learned positions, pre-norm
layers, cross-attention.
"""

from __future__ import annotations

from transformers.models.whisper import modeling_whisper

from fastattn.models.encoder_decoder import PreNormCrossDecoderLayer, PreNormEncoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class WhisperEncoderLayer(PreNormEncoderLayer, modeling_whisper.WhisperEncoderLayer):
    fastattn_original = modeling_whisper.WhisperEncoderLayer


class WhisperDecoderLayer(PreNormCrossDecoderLayer, modeling_whisper.WhisperDecoderLayer):
    fastattn_original = modeling_whisper.WhisperDecoderLayer


FAMILY = Family(
    name="whisper",
    attention="absolute positions, cross-attention, no padding",
    sites=(Site("residual_norm", WhisperEncoderLayer), Site("residual_norm", WhisperDecoderLayer)),
)
