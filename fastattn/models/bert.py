"""The BERT family: BertModel and every Bert head. Which of its layers are attention, residual+norm, MLP and
encoder.

Each class keeps the name of the one it replaces: sharding policies and `_no_split_modules` match by name.
"""

from __future__ import annotations

from transformers.models.bert import modeling_bert

from fastattn.layers import FusedActivation, FusedResidualNorm
from fastattn.models.family import Family, Site
from fastattn.models.packed import PackedRegion
from fastattn.models.self_attention import FusedSelfAttention

__all__ = ["FAMILY"]


class BertSelfAttention(FusedSelfAttention, modeling_bert.BertSelfAttention):
    fastattn_original = modeling_bert.BertSelfAttention


class BertSelfOutput(FusedResidualNorm, modeling_bert.BertSelfOutput):
    fastattn_original = modeling_bert.BertSelfOutput


class BertIntermediate(FusedActivation, modeling_bert.BertIntermediate):
    fastattn_original = modeling_bert.BertIntermediate


class BertOutput(FusedResidualNorm, modeling_bert.BertOutput):
    fastattn_original = modeling_bert.BertOutput


class BertEncoder(PackedRegion, modeling_bert.BertEncoder):
    fastattn_original = modeling_bert.BertEncoder


FAMILY = Family(
    name="bert",
    sites=(
        Site("attention", BertSelfAttention),
        Site("residual_norm", BertSelfOutput),
        Site("activation", BertIntermediate),
        Site("residual_norm", BertOutput),
        Site("encoder", BertEncoder),
    ),
    attention="absolute positions",
)
