"""BERT, whose layers many encoders have under names of their own."""

from __future__ import annotations

from transformers.models.bert import modeling_bert

from fastattn.models.bert_layers import bert_shaped

__all__ = ["FAMILY"]

FAMILY = bert_shaped(__name__, modeling_bert, "Bert", attention="absolute positions")
