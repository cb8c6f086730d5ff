"""Which architectures `attn_implementation="fastattn"` reaches, and how the others are refused."""

from __future__ import annotations

import importlib

import pytest
import torch

transformers = pytest.importorskip("transformers")

from fastattn.models.dispatch import cannot_dispatch, dispatches, family_reason, mask_form  # noqa: E402
from fastattn.models.interface import NAME  # noqa: E402

pytestmark = pytest.mark.model

DISPATCHING = {
    "albert": "AlbertAttention",
    "bart": "BartAttention",
    "bert": "BertSelfAttention",
    "clip": "CLIPAttention",
    "distilbert": "DistilBertSelfAttention",
    "electra": "ElectraSelfAttention",
    "gemma2": "Gemma2Attention",
    "gemma3": "Gemma3Attention",
    "gpt2": "GPT2Attention",
    "gpt_neox": "GPTNeoXAttention",
    "gpt_oss": "GptOssAttention",
    "llama": "LlamaAttention",
    "marian": "MarianAttention",
    "mbart": "MBartAttention",
    "mistral": "MistralAttention",
    "modernbert": "ModernBertAttention",
    "opt": "OPTAttention",
    "pegasus": "PegasusAttention",
    "phi": "PhiAttention",
    "qwen2": "Qwen2Attention",
    "qwen3": "Qwen3Attention",
    "roberta": "RobertaSelfAttention",
    "t5": "T5Attention",
    "vit": "ViTAttention",
    "whisper": "WhisperAttention",
    "xlm_roberta": "XLMRobertaSelfAttention",
}
SMALL = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
# Where a model first asks transformers for a mask it is refused; the second group keeps its attention classes
# in a table of implementations, where ours is missing.
REFUSED = {
    "bloom": lambda: transformers.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2),
    "mpnet": lambda: transformers.MPNetConfig(**SMALL, intermediate_size=16),
    "falcon": lambda: transformers.FalconConfig(**SMALL),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]]
    ),
}


def modeling(name):
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def config_class(module):
    models = (c for n, c in vars(module).items() if n.endswith("PreTrainedModel"))
    return next(c.config_class for c in models if c.config_class is not None)


@pytest.mark.parametrize("name", DISPATCHING)
def test_families_that_dispatch(name):
    module = modeling(name)
    attention = getattr(module, DISPATCHING[name], None)
    if attention is None:  # A release that calls it otherwise.
        attention = next(c for c in vars(module).values() if isinstance(c, type) and dispatches(c))
    assert dispatches(attention) and cannot_dispatch(attention) is None
    config = config_class(module)
    assert family_reason(config) is None and mask_form(config) == "padding"


@pytest.mark.parametrize("name", ["bloom", "deberta_v2", "falcon", "gpt_neo", "gptj", "mpnet", "xlnet"])
def test_families_that_do_not(name):
    module = modeling(name)
    attention = [c for n, c in vars(module).items() if "Attention" in n and isinstance(c, type)]
    assert attention and not any(map(dispatches, attention))
    assert "computes its attention itself" in family_reason(config_class(module)())


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_would_ignore_us_is_refused(name):
    with pytest.raises((ValueError, KeyError), match=NAME):
        model = transformers.AutoModel.from_config(REFUSED[name](), attn_implementation=NAME)
        model(torch.ones(1, 3, dtype=torch.int64))
    if name in ("bloom", "mpnet"):
        with pytest.raises(ValueError, match=r"does nothing for .*Config: .*computes its attention itself"):
            model(torch.ones(1, 3, dtype=torch.int64))


@torch.no_grad()
def test_a_model_transformers_never_asks_for_computes_what_it_did():
    """Nothing registered is consulted for DeBERTa: no refusal is possible, and nothing may change."""
    config = transformers.DebertaV2Config(**SMALL, intermediate_size=16)
    model = transformers.AutoModel.from_config(config, attn_implementation=NAME).eval()
    ids = torch.ones(2, 3, dtype=torch.int64)
    found = model(ids).last_hidden_state
    model.config._attn_implementation = "eager"
    assert torch.equal(found, model(ids).last_hidden_state)


@pytest.mark.parametrize("name", REFUSED)
def test_it_cannot_be_set_on_a_model_that_would_ignore_it(name):
    model = transformers.AutoModel.from_config(REFUSED[name]()).eval()
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    assert model.config._attn_implementation == before


def test_a_subclass_that_calls_the_forward_it_overrides_dispatches():
    base = modeling("llama").LlamaAttention

    class Same(base):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    class Other(base):
        def forward(self, hidden_states):
            return hidden_states

    assert dispatches(Same) and cannot_dispatch(Same) is None
    assert not dispatches(Other) and "does not look up" in cannot_dispatch(Other)


def test_an_attention_that_computes_more_is_left_alone(monkeypatch):
    """What a release might add to its eager function without our function knowing."""
    module = modeling("llama")

    def with_gate(module, query, key, value, attention_mask, scaling, dropout=0.0, gate=None, **kwargs):
        return query, None

    def with_clamp(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        return query.clamp(-1, 1), None

    def with_keyword(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        return query * kwargs["temperature"], None

    for eager, reason in ((with_gate, "takes gate"), (with_clamp, "uses clamp"), (with_keyword, "reads")):
        monkeypatch.setattr(module, "eager_attention_forward", eager)
        cannot_dispatch.cache_clear()
        assert reason in cannot_dispatch(module.LlamaAttention)
    monkeypatch.undo()
    cannot_dispatch.cache_clear()


def test_layers_of_which_some_compute_attention_take_the_masks_of_eager():
    modeling("git")
    assert mask_form(transformers.GitConfig) == "additive"
