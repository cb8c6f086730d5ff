"""The masks of `attn_implementation="fastattn"`: what the mask function hands over, and models under caches,
paddings and packings against "eager", whose masks are all four-dimensional.
"""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from fastattn.models.interface import attention_forward  # noqa: E402
from fastattn.models.masks import hides_nothing, padding_mask  # noqa: E402

pytestmark = pytest.mark.model

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
T5 = dict(vocab_size=97, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, decoder_start_token_id=0)
CONFIGS = {
    "Llama": lambda: transformers.LlamaConfig(**SMALL),
    "Gemma2": lambda: transformers.Gemma2Config(**SMALL, sliding_window=6, query_pre_attn_scalar=8),
    "GptOss": lambda: transformers.GptOssConfig(
        **SMALL, sliding_window=6, num_local_experts=3, num_experts_per_tok=2
    ),
    "GPT2": lambda: transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0
    ),
    "T5": lambda: transformers.T5Config(**T5),
}
_pairs = {}


def pair(name, **changes):
    """One model twice: with eager attention and with ours."""
    key = name, *changes.items()
    if key not in _pairs:
        torch.manual_seed(0)
        config = CONFIGS[name]()
        for attribute, value in changes.items():
            setattr(config, attribute, value)
        auto = transformers.AutoModelForSeq2SeqLM if name == "T5" else transformers.AutoModelForCausalLM
        head = auto._model_mapping[type(config)]
        reference = head._from_config(copy.deepcopy(config), attn_implementation="eager").eval()
        for parameter_name, parameter in reference.named_parameters():
            torch.nn.init.normal_(parameter, 1.0 if "norm" in parameter_name else 0.0, 0.3)
        model = head._from_config(copy.deepcopy(config), attn_implementation="fastattn").eval()
        model.load_state_dict(reference.state_dict())
        _pairs[key] = reference, model
    return _pairs[key]


def batch(padding, rows=3, length=17):
    ids = torch.randint(1, 97, (rows, length))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 4, 11)[:rows]):
        if padding == "left" and pad:
            mask[row, :pad] = 0
        if padding == "right" and pad:
            mask[row, -pad:] = 0
    return dict(input_ids=ids * mask, attention_mask=mask)


def assert_same(found, expected, real=...):
    assert torch.isfinite(found).all()
    error = (found[real] - expected[real]).abs().max() / expected[real].abs().max()
    assert error < 1e-4, f"error {error:.2e}"


def llama_mask(**arguments):
    defaults = dict(
        batch_size=2, q_length=5, kv_length=5, config=transformers.LlamaConfig(), dtype=torch.float32
    )
    pair("Llama")  # Its layers are then loaded, which say in which form they take a mask.
    return padding_mask(**{**defaults, **arguments})


def test_a_causal_padding_mask_stays_two_dimensional():
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert llama_mask() is None
    assert llama_mask(attention_mask=mask) is None
    mask = mask.clone()
    mask[1, :2] = False
    assert torch.equal(llama_mask(attention_mask=mask), mask)
    # One step of decoding: all keys so far, and no more.
    assert torch.equal(llama_mask(attention_mask=mask, q_length=1, q_offset=4), mask)
    # A shorter mask leaves the newest keys hidden, as transformers' own does.
    shorter = llama_mask(attention_mask=mask[:, :4])
    assert torch.equal(shorter, torch.nn.functional.pad(mask[:, :4], (0, 1)))


def test_a_static_cache_is_cut_to_the_keys_it_holds():
    for q_offset in (4, torch.tensor(4)):
        everything = llama_mask(kv_length=32, q_offset=q_offset)
        assert everything.shape == (2, 9) and hides_nothing(everything) and bool(everything.all())
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, :3] = False
        assert torch.equal(llama_mask(kv_length=32, q_offset=q_offset, attention_mask=mask), mask)
    # The step a compiled graph repeats has masks of one shape.
    step = llama_mask(kv_length=32, q_offset=4, q_length=1, allow_is_causal_skip=False)
    assert step.shape == (2, 1, 1, 32) and step[..., :5].all() and not step[..., 5:].any()
    # Padding everywhere, made by expanding one value, is not the mark of a mask that hides nothing.
    nothing = torch.zeros(1, 1, dtype=torch.bool).expand(2, 9)
    assert not hides_nothing(llama_mask(kv_length=32, q_offset=4, attention_mask=nothing))


def delegated():
    window = masking_utils.sliding_window_causal_mask_function(3)
    chunks = masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.int64))
    prefix = masking_utils.or_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k < 2)
    return {
        "window": dict(mask_function=window, local_size=3),
        "chunks": dict(mask_function=chunks, local_size=2),
        "anonymous": dict(mask_function=prefix),
        "vmap": dict(mask_function=masking_utils.causal_mask_function, use_vmap=True),
        "sliding cache": dict(kv_offset=2, q_offset=2),
        "four dimensions asked for": dict(allow_is_causal_skip=False),
        "bidirectional, likewise": dict(mask_function=masking_utils.bidirectional_mask_function),
    }


@pytest.mark.parametrize("name", delegated())
def test_what_is_more_than_padding_is_transformers_own_mask(name):
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :2] = False
    arguments = {"attention_mask": mask[:, : 7 if name == "sliding cache" else 5], **delegated()[name]}
    found = llama_mask(**arguments)
    skip = {k: v for k, v in arguments.items() if k != "allow_is_causal_skip"}
    expected = masking_utils.sdpa_mask(
        batch_size=2, q_length=5, kv_length=5, **skip, allow_is_causal_skip=False
    )
    assert found.dim() == 4 and torch.equal(found, expected)


def test_a_window_that_covers_every_key_is_none():
    window = masking_utils.sliding_window_causal_mask_function(5)
    assert llama_mask(mask_function=window, local_size=5) is None
    assert llama_mask(mask_function=window, local_size=5, q_offset=1, kv_length=6).dim() == 4


def test_modernbert_keeps_its_windowed_mask_two_dimensional():
    config = transformers.ModernBertConfig(local_attention=4)
    pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    arguments = dict(batch_size=2, q_length=9, kv_length=9, config=config, allow_is_bidirectional_skip=True)
    window = masking_utils.sliding_window_bidirectional_mask_function(2)
    assert torch.equal(padding_mask(**arguments, mask_function=window, attention_mask=mask), mask)
    other = masking_utils.sliding_window_bidirectional_mask_function(3)
    assert padding_mask(**arguments, mask_function=other, attention_mask=mask).dim() == 4


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_adversarial_batches(name, padding):
    """Batch equal to length, where a mask that is taken for another shape still fits, and length 1."""
    reference, model = pair(name)
    for length in (3, 17, 1):
        inputs = batch(padding if length > 11 else "none", length=length)
        if length == 3 and padding != "none":
            column = -1 if padding == "right" else 0
            inputs["attention_mask"][1, column] = 0
        real = inputs["attention_mask"].bool()
        if name == "T5":
            inputs["decoder_input_ids"], real = inputs["input_ids"], ...
        assert_same(model(**inputs).logits, reference(**inputs).logits, real)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_generation(name):
    """Token for token: greedy and three beams, caches that grow and caches of a fixed size."""
    reference, model = pair(name)
    for padding in ("left", "none"):
        inputs = batch(padding)
        for beams, cache in ((1, "dynamic"), (3, "dynamic"), (1, "static"), (3, "static")):
            options = dict(
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=None,
                num_beams=beams,
                cache_implementation=cache,
            )
            expected = reference.generate(**inputs, **options)
            assert torch.equal(model.generate(**inputs, **options), expected), (padding, beams, cache)


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
@torch.no_grad()
def test_assisted_generation(name):
    """Several candidates after a cache, and a cache cut back to those that were right."""
    reference, model = pair(name)
    torch.manual_seed(1)
    ids = torch.randint(1, 9, (1, 12)).repeat(1, 2)
    options = dict(max_new_tokens=10, do_sample=False, eos_token_id=None)
    expected = reference.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options, prompt_lookup_num_tokens=3), expected)
    if name == "Llama":
        assert torch.equal(model.generate(ids, **options, assistant_model=copy.deepcopy(model)), expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "GPT2"])
@torch.no_grad()
def test_a_prompt_in_chunks(name, static):
    """Several queries after a cache, left padding in its first part."""
    reference, model = pair(name)
    inputs = batch("left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits = []
    for each in (reference, model):
        if static:
            cache = transformers.StaticCache(config=each.config, max_cache_len=32)
        else:
            cache = transformers.DynamicCache(config=each.config)
        parts = [
            each(
                inputs["input_ids"][:, start:end],
                attention_mask=inputs["attention_mask"][:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            ).logits
            for start, end in ((0, 7), (7, 12), (12, 17))
        ]
        logits.append(torch.cat(parts, dim=1))
    assert_same(logits[1], logits[0], inputs["attention_mask"].bool())


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@torch.no_grad()
def test_sequences_packed_by_position(name):
    reference, model = pair(name)
    ids = torch.randint(1, 97, (1, 14))
    positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
    expected = reference(ids, position_ids=positions, use_cache=False).logits
    found = model(ids, position_ids=positions, use_cache=False).logits
    assert_same(found, expected)
    alone = model(ids[:, 5:], use_cache=False).logits
    assert_same(found[:, 5:], alone)


@torch.no_grad()
def test_a_decoder_made_bidirectional():
    reference, model = pair("Llama", is_causal=False)
    inputs = batch("right")
    real = inputs["attention_mask"].bool()
    assert_same(model(**inputs).logits, reference(**inputs).logits, real)
    plain = dict(input_ids=inputs["input_ids"])
    assert_same(model(**plain).logits, reference(**plain).logits)


@torch.no_grad()
def test_a_mask_of_four_dimensions_is_the_callers():
    """Boolean or added to the scores: causality is in it, or is not."""
    reference, model = pair("Llama")
    ids = torch.randint(1, 97, (2, 6))
    seen = (torch.rand(2, 1, 6, 6) < 0.5) | torch.eye(6, dtype=torch.bool)
    added = torch.zeros(2, 1, 6, 6).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected = reference(ids, attention_mask=added).logits
    assert_same(model(ids, attention_mask=added).logits, expected)
    assert_same(model(ids, attention_mask=seen).logits, expected)


def test_a_mask_that_does_not_fit_is_refused():
    query, key, value = torch.randn(3, 4, 2, 5, 8)
    module = torch.nn.Module()
    module.is_causal = True
    for mask in (
        torch.ones(4, 5),  # additive or not, two dimensions do not say
        torch.ones(4, 5, dtype=torch.int64),
        torch.ones(4, 6, dtype=torch.bool),
        torch.ones(5, 5, dtype=torch.bool),
        torch.ones(4, 5, 5, dtype=torch.bool),
        torch.ones(4, 1, 5, 5, dtype=torch.int64),
    ):
        with pytest.raises(ValueError, match="attention_mask is"):
            attention_forward(module, query, key, value, mask)
