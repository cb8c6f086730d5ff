"""XLM-R: RoBERTa over many languages, its layers copied."""

from __future__ import annotations

from transformers.models.xlm_roberta import modeling_xlm_roberta

from fastattn.models.bert_layers import bert_shaped

__all__ = ["FAMILY"]

FAMILY = bert_shaped(
    __name__,
    modeling_xlm_roberta,
    "XLMRoberta",
    attention="absolute positions counted from the first real token",
)
