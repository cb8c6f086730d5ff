"""ELECTRA, generator and discriminator: BERT's layers behind narrower embeddings."""

from __future__ import annotations

from transformers.models.electra import modeling_electra

from fastattn.models.bert_layers import bert_shaped

__all__ = ["FAMILY"]

FAMILY = bert_shaped(__name__, modeling_electra, "Electra", attention="absolute positions")
