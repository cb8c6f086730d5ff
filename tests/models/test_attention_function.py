"""`attn_implementation="fastattn"` against "eager" on small random models of the families whose attention
asks for more than a mask: sliding windows, soft capping, sinks, a relative position bias.
"""

from __future__ import annotations

import copy

import pytest
import torch

from fastattn.models.interface import attention_forward

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
T5 = dict(vocab_size=97, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
DECODERS = {
    "Llama": lambda: transformers.LlamaConfig(**SMALL),
    "Mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=5),
    "Qwen2": lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "Gemma2": lambda: transformers.Gemma2Config(
        **SMALL, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=0.5
    ),
    "Gemma3Text": lambda: transformers.Gemma3TextConfig(**SMALL, sliding_window=5, query_pre_attn_scalar=8),
    "GptOss": lambda: transformers.GptOssConfig(
        **SMALL, sliding_window=5, num_local_experts=3, num_experts_per_tok=2
    ),
}


def pair(config, head):
    """One model twice: with transformers' eager attention and with ours."""
    torch.manual_seed(0)
    reference = head._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    for name, parameter in reference.named_parameters():
        # Weights wide enough that attention is not uniform, and sinks and biases that are not zero.
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.3)
    model = head._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
    model.load_state_dict(reference.state_dict())
    return reference, model


def batch(padding, length=17):
    ids = torch.randint(1, 97, (3, length))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 4, 11)):
        if padding == "left" and pad:
            mask[row, :pad] = 0
        if padding == "right" and pad:
            mask[row, -pad:] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)


def assert_same(found, expected, real, context=""):
    """Real positions: a row of padding sees nothing, which eager makes the mean of what it does not see."""
    assert torch.isfinite(found).all(), context
    error = (found[real] - expected[real]).abs().max() / expected[real].abs().max()
    assert error < 1e-4, f"error {error:.2e}; {context}"


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoders(name, padding):
    config = DECODERS[name]()
    reference, model = pair(config, transformers.AutoModelForCausalLM._model_mapping[type(config)])
    inputs = batch(padding)
    real = inputs["attention_mask"].bool()
    expected, found = reference(**inputs), model(**inputs)
    assert_same(found.logits, expected.logits, real)
    plain = model(inputs["input_ids"])
    assert_same(plain.logits, reference(inputs["input_ids"]).logits, torch.ones_like(real))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_generation_with_left_padding(name, cache):
    """Past the window, where a sliding cache drops what is out of it."""
    config = DECODERS[name]()
    reference, model = pair(config, transformers.AutoModelForCausalLM._model_mapping[type(config)])
    inputs = batch("left")
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, cache_implementation=cache)
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))


@pytest.mark.parametrize("name", DECODERS)
def test_gradients(name):
    """Of every parameter, the sinks among them."""
    config = DECODERS[name]()
    reference, model = pair(config, transformers.AutoModelForCausalLM._model_mapping[type(config)])
    inputs = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for each in (reference, model):
        each(**inputs, labels=labels).loss.backward()
    for (parameter_name, found), expected in zip(
        model.named_parameters(), reference.parameters(), strict=True
    ):
        if expected.grad is None:
            assert found.grad is None
            continue
        error, scale = (found.grad - expected.grad).abs().max(), expected.grad.abs().max()
        assert error <= 1e-3 * scale, f"{parameter_name}: {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_recorded_attentions(name):
    config = DECODERS[name]()
    reference, model = pair(config, transformers.AutoModelForCausalLM._model_mapping[type(config)])
    inputs = batch("none")
    expected = reference(**inputs, output_attentions=True).attentions
    found = model(**inputs, output_attentions=True).attentions
    assert len(found) == len(expected) == 3
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@torch.no_grad()
def test_t5(padding):
    config = transformers.T5Config(**T5)
    reference, model = pair(config, transformers.T5ForConditionalGeneration)
    inputs = batch(padding)
    target = batch("none", 9)["input_ids"]
    expected = reference(**inputs, labels=target, output_attentions=True)
    found = model(**inputs, labels=target, output_attentions=True)
    every = torch.ones_like(target, dtype=torch.bool)
    assert_same(found.logits, expected.logits, every)
    for ours, theirs in zip(found.cross_attentions, expected.cross_attentions, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["sliding", "full"])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@torch.no_grad()
def test_bidirectional_window(name, padding):
    """ModernBERT, whose mask is missing where its window covers every key."""
    options = {k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}
    config = transformers.ModernBertConfig(
        **options, local_attention=8 if name == "sliding" else 64, global_attn_every_n_layers=2
    )
    reference, model = pair(config, transformers.ModernBertModel)
    inputs = batch(padding)
    expected, found = reference(**inputs), model(**inputs)
    assert_same(found.last_hidden_state, expected.last_hidden_state, inputs["attention_mask"].bool())


def test_a_window_without_a_complete_mask_is_applied():
    """As transformers' flash functions do: `sliding_window` keys, the query's own among them."""
    module = torch.nn.Module()
    query, key, value = torch.randn(3, 2, 4, 9, 8)
    distance = torch.arange(9) - torch.arange(9)[:, None]
    for causal in (False, True):
        module.is_causal = causal
        near = (distance.abs() < 3) & ((distance <= 0) | (not causal))
        padding = torch.arange(18).reshape(2, 9) % 7 > 0
        for mask, complete in ((None, near), (padding, near & padding[:, None, None, :])):
            found, _ = attention_forward(module, query, key, value, mask, sliding_window=3)
            expected, _ = attention_forward(
                module, query, key, value, complete.expand(2, 1, 9, 9), sliding_window=3
            )
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "name", ["cu_seq_lens_q", "cu_seq_lens_k", "cache", "indices", "block_indices", "packing", "sinks"]
)
def test_what_would_change_the_result_unseen_is_refused(name):
    query, key, value = torch.randn(3, 1, 2, 4, 8)
    with pytest.raises(ValueError, match=f"does not support {name}"):
        attention_forward(torch.nn.Module(), query, key, value, None, **{name: torch.zeros(2)})


VISION = dict(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
)
TEXT = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=64,
)
RETURNING_ATTENTIONS = {
    "Bert": lambda: (transformers.BertModel, transformers.BertConfig(**TEXT)),
    "ViT": lambda: (transformers.ViTModel, transformers.ViTConfig(**VISION)),
    "CLIPText": lambda: (transformers.CLIPTextModel, transformers.CLIPTextConfig(**TEXT)),
    "Bart": lambda: (
        transformers.BartModel,
        transformers.BartConfig(
            vocab_size=97,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
        ),
    ),
}


@pytest.mark.parametrize("name", RETURNING_ATTENTIONS)
@torch.no_grad()
def test_every_kind_of_attention_is_returned_when_asked_for(name):
    """Of an encoder, a decoder, a cross-attention and an image model; never an empty tuple."""
    head, config = RETURNING_ATTENTIONS[name]()
    reference, model = pair(config, head)
    inputs = dict(pixel_values=torch.randn(2, 3, 16, 16)) if name == "ViT" else batch("right")
    expected, found = (each(**inputs, output_attentions=True) for each in (reference, model))
    kinds = [key for key in expected if key.endswith("attentions") and expected[key]]
    assert len(kinds) == (3 if name == "Bart" else 1)
    for kind in kinds:
        assert len(found[kind]) == len(expected[kind]) == 2
        for ours, theirs in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


@torch.no_grad()
def test_recorded_attentions_of_a_static_cache():
    """As wide as the cache, as eager's are, zero where it holds nothing yet."""
    config = DECODERS["Llama"]()
    reference, model = pair(config, transformers.LlamaForCausalLM)
    inputs = batch("left")
    expected, found = (
        each(
            **inputs,
            past_key_values=transformers.StaticCache(config=each.config, max_cache_len=24),
            output_attentions=True,
        ).attentions
        for each in (reference, model)
    )
    real = inputs["attention_mask"].bool()[:, None].expand(3, 4, 17)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], rtol=1e-3, atol=1e-5)
