"""Decoders in the forms that only some of their models have, and what is special to families whose attention
does not ask transformers' interface. What every family must do is in test_families.py.
"""

from __future__ import annotations

import copy

import pytest
import torch
from family_models import (
    BY_NAME,
    assert_same,
    assert_same_gradients,
    batch,
    build,
    gradients,
    outputs,
)

import fastattn

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model


# A family's case, what its configuration is changed to, the attention implementation, and why some of its
# layers are then skipped.
FORMS = {
    "GPT-2 by layer": ("GPT-2", dict(scale_attn_by_inverse_layer_idx=True), None, ""),
    "GPT-2 unscaled": ("GPT-2", dict(scale_attn_weights=False), None, ""),
    "GPT-2 upcast": ("GPT-2", dict(reorder_and_upcast_attn=True), "eager", ""),
    "Galactica": (
        "OPT",
        dict(activation_function="gelu", enable_bias=False, layer_norm_elementwise_affine=False),
        None,
        "",
    ),
    "OPT without last norm": ("OPT", dict(_remove_final_layer_norm=True), None, ""),
    "BLOOM residual of norms": (
        "BLOOM",
        dict(apply_residual_connection_post_layernorm=True),
        None,
        "apply_residual_connection_post_layernorm",
    ),
    "BLOOM in slices": ("BLOOM", dict(pretraining_tp=2, slow_but_exact=True), None, "slow_but_exact"),
    "Falcon 2": ("Falcon 40b", dict(num_ln_in_parallel_attn=1), None, "no bias"),
    "Falcon of many heads": ("Falcon 7b", dict(multi_query=False), None, "no bias"),
    "Falcon parallel ALiBi": ("Falcon rw", dict(parallel_attn=True), None, ""),
    "Falcon ALiBi, eager": ("Falcon rw", dict(), "eager", ""),
    "Falcon, eager": ("Falcon 7b", dict(), "eager", "no bias"),
    "Phi with normalized queries": ("Phi", dict(qk_layernorm=True), None, ""),
    "EmbeddingGemma": ("Gemma 3", dict(use_bidirectional_attention=True), None, ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    """Outputs and gradients of the model before the swap, in the same implementation, also where the mask has
    holes; what is not swapped says why.
    """
    name, changes, implementation, reason = FORMS[form]
    case = BY_NAME[name]
    reference = build(case, case.base, implementation, **changes)
    model = build(case, case.base, implementation, **changes)
    skipped = [site.reason for site in fastattn.optimize(model).sites if site.status == "skipped"]
    assert all(reason and reason in each for each in skipped) and bool(skipped) == bool(reason), skipped
    for kind in ("left", "right", "holes"):
        inputs = batch(model, "right" if kind == "holes" else kind)
        if kind == "holes":
            inputs["attention_mask"][:, 3:5] = 0
        with torch.no_grad():
            assert_same(model(**inputs), reference(**inputs), inputs, kind)
    assert_same_gradients(gradients(model, inputs), gradients(reference, inputs))


@torch.no_grad()
def test_gpt2_cross_attention():
    """As the decoder of an encoder-decoder, generating with its two caches."""
    parts = [
        transformers.BertConfig(
            vocab_size=97, hidden_size=60, num_attention_heads=3, num_hidden_layers=1, intermediate_size=72
        ),
        transformers.GPT2Config(
            vocab_size=97, n_embd=60, n_head=3, n_layer=2, n_positions=64, add_cross_attention=True
        ),
    ]
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    torch.manual_seed(0)
    model = transformers.EncoderDecoderModel(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.3)
    reference = copy.deepcopy(model)
    report = fastattn.optimize(model)
    assert not [site for site in report.sites if site.reason], report.table()
    torch.manual_seed(1)
    inputs = dict(
        input_ids=torch.randint(4, 97, (3, 9)),
        attention_mask=(torch.arange(9) < torch.tensor([[9], [4], [1]])).long(),
        decoder_input_ids=torch.randint(4, 97, (3, 7)),
    )
    assert_same(model(**inputs).logits, reference(**inputs).logits, {})
    del inputs["decoder_input_ids"]
    options = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))


@pytest.mark.parametrize("name", ["BLOOM", "Falcon 7b", "Falcon 40b", "GPT-J", "GPT-Neo"])
@torch.no_grad()
def test_attentions_in_the_middle_of_decoding(name):
    """Weights asked for in one step, by the original's own formula, and a cache the next step can read."""
    case = BY_NAME[name]
    reference, model = build(case, case.base, "eager"), build(case, case.base)
    fastattn.optimize(model)
    inputs = batch(model, "left")
    found = []
    for each in (reference, model):
        cache, results = None, []
        for step in range(3):
            ids = inputs["input_ids"] if step == 0 else torch.full((4, 1), 5 + step)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)
            result = each(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                output_attentions=step == 1,
                use_cache=True,
            )
            cache = result.past_key_values
            results.append(outputs(result))
        found.append(results)
    assert len(found[1][1]) == 1 + len(model.h)
    for step, (expected, got) in enumerate(zip(*found, strict=True)):
        assert_same(got, expected, inputs if step == 0 else {}, f"step {step}")


@torch.no_grad()
def test_a_hook_on_blooms_attention_sees_the_sum():
    """The original's attention adds the residual itself; ours leaves that to the block where nobody looks."""
    case = BY_NAME["BLOOM"]
    reference, model = build(case, case.base), build(case, case.base)
    fastattn.optimize(model)
    inputs = batch(model, "right")
    seen = []
    for each in (reference, model):
        for layer in each.h:
            layer.self_attention.register_forward_hook(lambda module, args, out: seen.append(out[0]))
        each(**inputs)
    for expected, got in zip(seen[:2], seen[2:], strict=True):
        assert_same(got, expected, inputs)


@torch.no_grad()
def test_gemma3_with_images():
    """The text part of the multimodal model is swapped too; its images are seen in both directions."""
    text = dict(BY_NAME["Gemma 3"].options)
    vision = dict(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=90
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    reference = copy.deepcopy(model)
    report = fastattn.optimize(model)
    swapped = [site.name for site in report.sites if site.status == "swapped"]
    assert sum("language_model.layers" in name and name.endswith("self_attn") for name in swapped) == 3
    ids = torch.randint(4, 80, (2, 12))
    ids[:, 3:7] = 90
    inputs = dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=(ids == 90).long(),
        pixel_values=torch.randn(2, 3, 16, 16),
    )
    assert_same(model(**inputs).logits, reference(**inputs).logits, {})
    options = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(**inputs, **options), reference.generate(**inputs, **options))


@torch.no_grad()
def test_norms_kept_in_float32():
    """gpt-oss in half precision keeps its norms' weights in float32, and its hidden states are not."""
    case = BY_NAME["gpt-oss"]
    models = [build(case, case.base).bfloat16() for _ in range(2)]
    for model in models:
        for name, module in model.named_modules():
            if name.endswith("norm"):
                module.float()
    reference, model = models
    fastattn.optimize(model)
    inputs = batch(model, "right")
    found, expected = model(**inputs).last_hidden_state, reference(**inputs).last_hidden_state
    assert found.dtype == expected.dtype
    assert_same(found, expected, {}, tolerance=0.05)
