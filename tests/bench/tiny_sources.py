"""Small models of random weights, one of every kind, and what contenders are copied from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.bench.contenders import Models, Source, kind_of

__all__ = ["MODELS", "source_of"]

transformers = pytest.importorskip("transformers")

_BERT = dict(vocab_size=99, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64)
_GPT2 = dict(
    vocab_size=99, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=5, eos_token_id=5
)  # fmt: skip
_LLAMA = dict(
    vocab_size=99, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
    intermediate_size=64, max_position_embeddings=64,
)  # fmt: skip
_T5 = dict(vocab_size=99, d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=64, decoder_start_token_id=0)


def _made(architecture: str, options: dict[str, Any], scale: float = 3.0) -> Callable[[], torch.nn.Module]:
    def make() -> torch.nn.Module:
        model_class = getattr(transformers, architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: torch.nn.Module = model_class(model_class.config_class(**options))
        # Weights as drawn give almost the same logits everywhere: what is swapped or cut would hardly show.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(scale)
        return model.eval()

    return make


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": _made("BertModel", _BERT),
    "bert-classifier": _made("BertForSequenceClassification", {**_BERT, "num_labels": 5}),
    "gpt2": _made("GPT2LMHeadModel", _GPT2),
    "llama": _made("LlamaForCausalLM", _LLAMA),
    "t5": _made("T5ForConditionalGeneration", _T5, scale=1.0),
}


def source_of(model: torch.nn.Module) -> Source:
    """On the CPU, swapped by `optimize`."""
    return Source(Models(model), torch.device("cpu"), kind_of(model))
