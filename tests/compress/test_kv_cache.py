"""Eight-bit key/value caches: generation as with transformers' own, in a quarter of the bytes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import transformers
from transformers import DynamicCache, EncoderDecoderCache

from fastattn.compress.kv_cache import (
    KV_CACHES,
    QuantizedCache,
    QuantizedLayer,
    cache_bytes,
    quantized_cache_kind,
    stop_quantized_cache,
    use_quantized_cache,
)

pytestmark = pytest.mark.model

IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
SIZES = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, **IDS)


def _llama(**options):
    config = transformers.LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def _mistral(window):
    config = transformers.MistralConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, sliding_window=window
    )
    return transformers.MistralForCausalLM(config).eval()


def _gemma2():
    config = transformers.Gemma2Config(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=6
    )
    return transformers.Gemma2ForCausalLM(config).eval()


def _gpt2():
    config = transformers.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, **IDS)
    return transformers.GPT2LMHeadModel(config).eval()


def _t5():
    config = transformers.T5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
        **{key: IDS[key] for key in ("eos_token_id", "pad_token_id")},
    )
    return transformers.T5ForConditionalGeneration(config).eval()


MODELS = {
    "llama": _llama,
    "gpt2": _gpt2,
    "mistral": lambda: _mistral(6),
    "gemma2": _gemma2,
    "t5": _t5,
}
STRATEGIES = {
    "greedy": {},
    "beams": dict(num_beams=3, num_return_sequences=2),
}


def _sharp(model):
    """Logits far enough apart that an eight-bit error changes no choice."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4.0)
    return model


def _prompt():
    ids = torch.randint(3, 128, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _generated(model, prompt, strategy):
    return model.generate(
        **prompt,
        **STRATEGIES[strategy],
        max_new_tokens=8,
        min_new_tokens=8,
        return_dict_in_generate=True,
        output_scores=True,
    )


def _largest_difference(actual, expected):
    finite = expected.isfinite()
    return float((actual[finite] - expected[finite]).abs().max() / expected[finite].abs().max())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_generates_what_the_full_cache_does(name, strategy):
    """Left-padded batch; the prompt is longer than the sliding windows."""
    model, prompt = MODELS[name](), _prompt()
    expected = _generated(model, prompt, strategy)
    use_quantized_cache(model, "int8")
    actual = _generated(model, prompt, strategy)
    assert torch.equal(actual.sequences, expected.sequences)
    caches = [actual.past_key_values]
    if isinstance(caches[0], EncoderDecoderCache):
        caches = [caches[0].self_attention_cache, caches[0].cross_attention_cache]
    assert all(isinstance(layer, QuantizedLayer) for cache in caches for layer in cache.layers)
    # Quantized: the scores differ after the prompt, by little, and not at the prompt.
    assert torch.equal(actual.scores[0], expected.scores[0])
    assert 0 < _largest_difference(actual.scores[1], expected.scores[1]) < 0.02


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_the_rounding_differs(name, strategy, monkeypatch):
    """With float32 numbers in place of integers, every score is the full cache's."""
    monkeypatch.setitem(KV_CACHES, "fp8", (torch.float32, 1.0))
    model, prompt = MODELS[name](), _prompt()
    expected = _generated(model, prompt, strategy)
    use_quantized_cache(model, "fp8")
    actual = _generated(model, prompt, strategy)
    for mine, full in zip(actual.scores, expected.scores, strict=True):
        assert _largest_difference(mine, full) < 1e-5


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_read_back_within_the_rounding_of_their_token_and_head(kind, dtype):
    keys = torch.randn(2, 3, 7, 16).mul(torch.logspace(-3, 3, 7)[:, None]).to(dtype)
    keys[0, 1, 2] = 0.0
    before = keys.clone()
    layer = QuantizedLayer(kind)
    layer.update(keys[:, :, :5], -keys[:, :, :5])
    layer.update(keys[:, :, 5:], -keys[:, :, 5:])
    assert torch.equal(keys, before)
    largest = keys.float().abs().amax(dim=-1, keepdim=True)
    rounding = {"int8": 1 / 254, "fp8": 1 / 28}[kind] + {torch.float32: 1e-6, torch.bfloat16: 1 / 256}[dtype]
    assert layer.keys.dtype == dtype
    assert ((layer.keys.float() - keys.float()).abs() <= largest * rounding).all()
    assert torch.equal(layer.values, -layer.keys)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_that_is_not_finite_stays_so_in_its_row_alone(bad):
    keys = torch.randn(1, 2, 4, 8)
    keys[0, 1, 2, 3] = bad
    layer = QuantizedLayer()
    layer.update(keys, torch.randn(1, 2, 4, 8))
    finite = layer.keys.isfinite().all(dim=-1)
    assert finite.sum() == 7 and not finite[0, 1, 2]
    assert layer.values.isfinite().all()


def test_bytes_are_a_quarter_and_the_scales():
    config = transformers.LlamaConfig(**{**SIZES, "hidden_size": 256}, num_attention_heads=4)
    model = transformers.LlamaForCausalLM(config).eval()
    prompt = torch.randint(3, 128, (2, 50))
    full, quantized = DynamicCache(config=config), QuantizedCache(config, "int8")
    with torch.no_grad():
        model(prompt, past_key_values=full)
        model(prompt, past_key_values=quantized)
    tokens_and_heads = 2 * 50 * 4 * 2 * config.num_hidden_layers
    assert cache_bytes(full) == tokens_and_heads * 64 * 4
    assert quantized.nbytes == tokens_and_heads * (64 + 4) == cache_bytes(quantized)


@pytest.mark.once
def test_a_sliding_window_holds_no_more_than_its_tokens():
    model = _mistral(8)
    use_quantized_cache(model, "int8")
    cache = model.generate(
        torch.randint(3, 128, (2, 30)), max_new_tokens=4, min_new_tokens=4, return_dict_in_generate=True
    ).past_key_values
    per_token = 2 * 2 * 2 * 2 * (16 + 4)
    assert cache_bytes(cache) == 7 * per_token
    assert cache.layers[0]._keys.numbers.untyped_storage().nbytes() == 7 * 2 * 2 * 16
    assert cache.get_seq_length() == 33


def test_rows_are_reordered_repeated_selected_and_dropped_with_their_scales():
    states = [torch.randn(3, 2, 5, 8) for _ in range(2)]
    expected, actual = DynamicCache(), DynamicCache()
    expected.update(*states, 0)
    actual.layers, layer = [QuantizedLayer()], None
    layer = actual.layers[0]
    layer.update(*states)
    expected.layers[0].keys, expected.layers[0].values = layer.keys, layer.values
    for change in (
        lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])),
        lambda cache: cache.batch_repeat_interleave(2),
        lambda cache: cache.batch_select_indices(torch.tensor([0, 3])),
        lambda cache: cache.crop(-2),
        lambda cache: cache.crop(0),
    ):
        change(expected)
        change(actual)
        assert torch.equal(layer.keys, expected.layers[0].keys)
        assert torch.equal(layer.values, expected.layers[0].values)
        assert actual.get_seq_length() == expected.get_seq_length()
    actual.reset()
    assert actual.get_seq_length() == 0 and cache_bytes(actual) == 0


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_assisted_generation_rolls_the_cache_back(name):
    model, assistant, prompt = _sharp(MODELS[name]()), _sharp(MODELS[name]()), _prompt()
    prompt = {key: value[1:2] for key, value in prompt.items()}
    use_quantized_cache(model, "int8")
    expected = model.generate(**prompt, max_new_tokens=10, do_sample=False)
    use_quantized_cache(assistant, "int8")
    actual = model.generate(**prompt, max_new_tokens=10, do_sample=False, assistant_model=assistant)
    assert torch.equal(actual, expected)


def test_layers_that_a_cache_makes_as_it_goes():
    model, cache = _llama(), DynamicCache()
    use_quantized_cache(model, "int8")
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 5)), past_key_values=cache)
        model(torch.randint(3, 128, (1, 1)), past_key_values=cache)
    assert [type(layer) for layer in cache.layers] == [QuantizedLayer] * 2
    assert cache.get_seq_length() == 6


@pytest.mark.once
def test_copies_and_pickles_keep_it_and_stopping_ends_it():
    model = _llama()
    use_quantized_cache(model, "int8")
    use_quantized_cache(model, "fp8")
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert quantized_cache_kind(each) == "fp8"
        assert len(each._forward_pre_hooks) == 1
        stop_quantized_cache(each)
        assert quantized_cache_kind(each) is None
        out = each.generate(torch.tensor([[5, 6]]), max_new_tokens=2, return_dict_in_generate=True)
        assert not any(isinstance(layer, QuantizedLayer) for layer in out.past_key_values.layers)


@pytest.mark.once
def test_a_cache_that_holds_something_stays_and_a_static_one_is_told_of():
    model, cache = _llama(), DynamicCache()
    with torch.no_grad():
        model(torch.randint(3, 128, (1, 5)), past_key_values=cache)
        use_quantized_cache(model, "int8")
        model(torch.randint(3, 128, (1, 1)), past_key_values=cache)
        assert not any(isinstance(layer, QuantizedLayer) for layer in cache.layers)
        static = transformers.StaticCache(config=model.config, max_cache_len=8)
        with pytest.warns(UserWarning, match="StaticCache"):
            model(torch.randint(3, 128, (1, 5)), past_key_values=static)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randint(3, 128, (1, 5)))


@pytest.mark.once
def test_swapped_models_keep_it():
    import fastattn

    model, prompt = _sharp(_llama()), _prompt()
    expected = model.generate(**prompt, max_new_tokens=8)
    use_quantized_cache(model, "int8")
    fastattn.optimize(model)
    out = model.generate(**prompt, max_new_tokens=8, return_dict_in_generate=True)
    assert all(isinstance(layer, QuantizedLayer) for layer in out.past_key_values.layers)
    assert torch.equal(out.sequences, expected)
    fastattn.restore(model)
    assert quantized_cache_kind(model) == "int8"


@pytest.mark.once
def test_gradients_of_a_call_reach_its_own_states():
    layer = QuantizedLayer()
    layer.update(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4))
    new = torch.randn(1, 1, 1, 4, requires_grad=True)
    keys, values = layer.update(new, new)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(new.grad, torch.full_like(new, 3.0))


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "kind", "says"),
    [
        (_llama, "int4", "'int4'.*'int8'"),
        (
            lambda: transformers.BertModel(transformers.BertConfig(**SIZES, num_attention_heads=4)),
            "int8",
            "Bert",
        ),
        (lambda: torch.nn.Linear(2, 2), "int8", "Linear is no transformers model"),
    ],
)
def test_bad_input(make, kind, says):
    model = make()
    with pytest.raises(ValueError, match=says):
        use_quantized_cache(model, kind)
    assert not any(module._forward_pre_hooks for module in model.modules())
