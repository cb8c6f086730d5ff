"""RoBERTa: BERT's layers."""

from __future__ import annotations

from transformers.models.roberta import modeling_roberta

from fastattn.models.bert_layers import bert_shaped

__all__ = ["FAMILY"]

FAMILY = bert_shaped(
    __name__, modeling_roberta, "Roberta", attention="absolute positions counted from the first real token"
)
