"""The ViT family: patches of an image, learned positions, pre-norm layers."""

from __future__ import annotations

from transformers.models.vit import modeling_vit

from fastattn.models.family import Family, Site
from fastattn.models.vision import FusedMLP, PreNormLayer

__all__ = ["FAMILY"]


class ViTMLP(FusedMLP, modeling_vit.ViTMLP):
    fastattn_original = modeling_vit.ViTMLP


class ViTLayer(PreNormLayer, modeling_vit.ViTLayer):
    fastattn_original = modeling_vit.ViTLayer
    attention_name = "attention"
    entry_norm_name = "layernorm_before"
    second_norm_name = "layernorm_after"


FAMILY = Family(
    name="vit",
    attention="absolute positions, no padding",
    sites=(Site("activation", ViTMLP), Site("residual_norm", ViTLayer)),
)
