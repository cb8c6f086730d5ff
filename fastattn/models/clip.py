"""The CLIP family: a causal text tower and a vision tower made of the same layers."""

from __future__ import annotations

from transformers.models.clip import modeling_clip

from fastattn.models.family import Family, Site
from fastattn.models.vision import FusedMLP, PreNormLayer

__all__ = ["FAMILY"]


class CLIPMLP(FusedMLP, modeling_clip.CLIPMLP):
    fastattn_original = modeling_clip.CLIPMLP


class CLIPEncoderLayer(PreNormLayer, modeling_clip.CLIPEncoderLayer):
    fastattn_original = modeling_clip.CLIPEncoderLayer
    attention_name = "self_attn"
    entry_norm_name = "layer_norm1"
    second_norm_name = "layer_norm2"


FAMILY = Family(
    name="clip",
    attention="absolute positions, causal text tower",
    sites=(Site("activation", CLIPMLP), Site("residual_norm", CLIPEncoderLayer)),
    limits=("the text tower computes its padding: its attention is causal, as a decoder's",),
)
