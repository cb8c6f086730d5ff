"""The gpt-oss family: attention sinks, every other layer under a sliding window, a mixture of experts."""

from __future__ import annotations

from transformers.models.gpt_oss import modeling_gpt_oss

from fastattn.layers import FusedRMSNorm
from fastattn.models.decoder import PreNormDecoderLayer
from fastattn.models.family import Family, Site

__all__ = ["FAMILY"]


class GptOssRMSNorm(FusedRMSNorm, modeling_gpt_oss.GptOssRMSNorm):
    fastattn_original = modeling_gpt_oss.GptOssRMSNorm


class GptOssDecoderLayer(PreNormDecoderLayer, modeling_gpt_oss.GptOssDecoderLayer):
    fastattn_original = modeling_gpt_oss.GptOssDecoderLayer


FAMILY = Family(
    name="gpt_oss",
    attention="rotary positions, grouped queries, attention sinks, sliding window in some layers",
    sites=(
        Site("norm", GptOssRMSNorm),
        Site("residual_norm", GptOssDecoderLayer),
    ),
    limits=(
        "its experts are left alone: transformers chooses how they run (grouped products, quantized kernels)",
    ),
)
