"""Small models, and a way to put an error into one layer of one."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastattn

transformers = pytest.importorskip("transformers")


def spread(model):
    """Weights wide enough that attention is not nearly uniform, where most errors would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


@pytest.fixture
def swapped_bert(bert_config):
    """A reference and its swapped copy, of a BERT with a classifier or another head."""

    def build(head: str = "BertForSequenceClassification", **options: Any):
        reference = spread(getattr(transformers, head)(bert_config).eval())
        model = copy.deepcopy(reference)
        fastattn.optimize(model, **options)
        return reference, model

    return build


@pytest.fixture
def tiny_llama():
    """A reference in eager attention, and the same model with attn_implementation="fastattn"."""
    # Registers the name with transformers.
    importlib.import_module("fastattn.models.interface")
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    reference = spread(transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager").eval())
    model = copy.deepcopy(reference)
    model.set_attn_implementation("fastattn")
    return reference, model


@pytest.fixture
def plant():
    """Replace the forward of one module by `change(original_forward, self, *args, **kwargs)`, in a subclass:
    an instance's own forward would be seen as a hook.
    """

    def planted(module: torch.nn.Module, change: Callable[..., Any]) -> None:
        original = type(module)

        def forward(self, *args, **kwargs):
            return change(lambda *a, **k: original.forward(self, *a, **k), self, *args, **kwargs)

        module.__class__ = type(original.__name__, (original,), {"forward": forward})

    return planted
