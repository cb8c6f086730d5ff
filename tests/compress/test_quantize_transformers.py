"""Quantized transformers models: saved, loaded, quantized while loading, adapted, and generating."""

from __future__ import annotations

import gc
import json

import pytest
import torch

import fastattn
from fastattn.compress.kv_cache import quantized_cache_kind
from fastattn.compress.quantization import FastattnConfig, loading, speed
from fastattn.layers import QuantizedLinear
from fastattn.ops.packed_weight import SCHEMES

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(speed, "_BUDGET_S", 0.0)


def bert(kind="BertForSequenceClassification", **options):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128)
    config = transformers.BertConfig(vocab_size=97, **sizes, **options)
    return getattr(transformers, kind)(config).eval()


def gpt2():
    config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=97, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


def t5():
    sizes = dict(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    config = transformers.T5Config(vocab_size=97, decoder_start_token_id=0, **sizes)
    return transformers.T5ForConditionalGeneration(config).eval()


MODELS = {"BERT": bert, "GPT-2": gpt2, "T5": t5}
TOKENS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model):
    inputs = {"input_ids": TOKENS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = TOKENS[:, :5]
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_bit_for_bit(name, scheme, tmp_path):
    model = MODELS[name]()
    fastattn.optimize(model)
    fastattn.quantize(model, scheme)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["quant_method"] == "fastattn" and saved["scheme"] == scheme
    for again in (type(model).from_pretrained(tmp_path), fastattn.load(tmp_path)):
        fastattn.optimize(again)
        assert torch.equal(logits(again), expected)
        state = again.state_dict()
        assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
        again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(fastattn.load(tmp_path / "again")), logits(fastattn.load(tmp_path)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_while_loading_as_after(name, scheme, tmp_path):
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "float")
    kind = type(model)
    loaded = kind.from_pretrained(tmp_path / "float", quantization_config=FastattnConfig(scheme))
    fastattn.quantize(model, scheme)
    assert torch.equal(logits(loaded), logits(model))
    assert type(loaded.config.quantization_config) is FastattnConfig
    with pytest.raises(ValueError, match="quantized already"):
        fastattn.quantize(loaded, scheme)
    loaded.save_pretrained(tmp_path / "quantized")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "quantized")), logits(model))


def test_while_loading_what_is_excluded_missing_or_too_wrong_is_told_apart(tmp_path):
    base = bert("BertForMaskedLM")
    base.save_pretrained(tmp_path)
    config = FastattnConfig("int4-weight", method="absmax", exclude=["*.layer.0"], group_size=32)
    loaded = transformers.BertModel.from_pretrained(tmp_path, quantization_config=config)
    kinds = {name: type(each) for name, each in loaded.named_modules()}
    assert kinds["encoder.layer.0.output.dense"] is torch.nn.Linear
    assert kinds["encoder.layer.1.output.dense"] is QuantizedLinear
    # The checkpoint has no pooler: drawn at random, then quantized like the rest.
    assert kinds["pooler.dense"] is QuantizedLinear and loaded.pooler.dense.weight.dtype == torch.int8
    strict = FastattnConfig("int4-weight", max_error=1e-6)
    loaded = transformers.BertForMaskedLM.from_pretrained(tmp_path, quantization_config=strict)
    assert not any(isinstance(each, QuantizedLinear) for each in loaded.modules())
    assert torch.equal(logits(loaded), logits(base))


def test_other_classes_load_the_same_folder(tmp_path):
    model = bert()
    fastattn.quantize(model, "int8")
    model.save_pretrained(tmp_path / "head")
    base = transformers.BertModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert torch.equal(base(TOKENS)[0], model.bert(TOKENS)[0])
    base.save_pretrained(tmp_path / "base")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(again.bert(TOKENS)[0], base(TOKENS)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, tmp_path):
    """T5 asks the dtype of a weight and casts its input to it; scales stay float32 on every way."""
    for build in (t5, gpt2):
        model = build()
        expected = logits(model)
        model.save_pretrained(tmp_path / "float")
        for scheme in ("int8", "fp8"):
            config = FastattnConfig(scheme)
            loading = type(model).from_pretrained(tmp_path / "float", dtype=dtype, quantization_config=config)
            loading.save_pretrained(tmp_path / "half")
            loaded = type(model).from_pretrained(tmp_path / "half", dtype=dtype)
            cast = type(model).from_pretrained(tmp_path / "float")
            fastattn.quantize(cast, scheme)
            cast.to(dtype)
            assert torch.equal(logits(loading), logits(loaded))
            for each in (loading, loaded, cast):
                fastattn.optimize(each)
                scales = [x for name, x in each.named_buffers() if name.endswith("weight_scale")]
                assert scales and all(x.dtype == torch.float32 for x in scales)
                found = logits(each).float()
                assert (found - expected).norm() < 0.1 * expected.norm()
            assert loading.half().dtype == torch.float16


@torch.no_grad()
def test_generates_with_a_quantized_cache(tmp_path):
    for build in (gpt2, t5):
        model = build()
        fastattn.quantize(model, "int8", kv_cache="int8")
        options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
        expected = model.generate(TOKENS, **options)
        fastattn.optimize(model)
        assert torch.equal(model.generate(TOKENS, **options), expected)
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert torch.equal(again.generate(TOKENS, **options), expected)
        assert quantized_cache_kind(again) == "int8"


def test_a_quantized_cache_alone_is_restored():
    model = gpt2()
    fastattn.quantize(model, "int8", kv_cache="int8", exclude="*")
    assert quantized_cache_kind(model) == "int8"
    fastattn.restore(model)
    assert quantized_cache_kind(model) is None
    # What was kept then is not what a later call kept.
    fastattn.quantize(model, "int8", kv_cache="int8", exclude="*")
    fastattn.quantize(model, "int8")
    with pytest.raises(ValueError, match="not kept"):
        fastattn.restore(model)


def test_restore_and_shared_configs():
    """Another model built of the same config hears nothing of it."""
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=128
    )
    one, other = (transformers.BertForSequenceClassification(config).eval() for _ in range(2))
    expected, attributes = logits(one), sorted(one.__dict__)

    def quantize():
        fastattn.quantize(one, "int8", keep_original=True)
        assert one.config.quantization_config.scheme == "int8"

    def within():
        with fastattn.optimized(one):
            quantize()
        assert one.config.quantization_config.scheme == "int8"

    for steps in ([fastattn.optimize, quantize], [quantize, fastattn.optimize], [within]):
        for step in steps:
            step(one) if step is fastattn.optimize else step()
        assert not hasattr(other.config, "quantization_config") and other.config is config
        fastattn.restore(one)
        assert all(each.config is config for each in one.modules() if hasattr(each, "config"))
        assert not hasattr(config, "quantization_config")
        assert sorted(one.__dict__) == attributes
        assert torch.equal(logits(one), expected)
    config.name_or_path = "some/model"
    fastattn.quantize(one, "int8")
    with pytest.raises(ValueError, match="load some/model again"):
        fastattn.restore(one)


def test_dequantize():
    model = bert()
    fastattn.quantize(model, "int8-weight")
    expected = logits(model)
    model.dequantize()
    assert not any(isinstance(each, QuantizedLinear) for each in model.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert fastattn.quantize(model, "int8").quantized


@pytest.mark.parametrize("scheme", SCHEMES)
def test_adapters_on_top(scheme):
    """QLoRA: PEFT's adapters train, the quantized weights do not, and nothing but the adapters moves."""
    peft = pytest.importorskip("peft")
    model = gpt2()
    fastattn.optimize(model)
    fastattn.quantize(model, scheme)
    before = logits(model)
    options = dict(target_modules="all-linear", r=2, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    torch.testing.assert_close(logits(adapted), before)
    adapted.train()
    optimizer = torch.optim.Adam([each for each in adapted.parameters() if each.requires_grad], lr=0.02)
    weight = model.transformer.h[0].mlp.c_fc.base_layer.weight.clone()
    losses = []
    for _ in range(4):
        loss = adapted(TOKENS, labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(model.transformer.h[0].mlp.c_fc.base_layer.weight, weight)


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        (dict(scheme="int3"), ValueError, "int3"),
        (dict(scheme="int4-weight", method="gptq"), ValueError, "calibration"),
        (dict(scheme="int8", exclude=["nowhere"]), ValueError, "nowhere"),
        (dict(scheme="int8", layers=["encoder.layer.0.output.dense"]), ValueError, "not quantized"),
    ],
)
def test_bad_configurations(config, error, said, tmp_path):
    bert("BertModel").save_pretrained(tmp_path)
    with pytest.raises(error, match=said):
        transformers.BertModel.from_pretrained(tmp_path, quantization_config=FastattnConfig(**config))


def float_matrices():
    """Bytes of the live float matrices, a storage once."""
    live = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    found = {
        each.untyped_storage().data_ptr(): each.nbytes
        for each in live
        if each.dim() == 2 and each.is_floating_point() and not each.is_meta and min(each.shape) >= 64
    }
    return sum(found.values())


def test_loading_never_holds_the_float_model(tmp_path, monkeypatch):
    model = bert("BertModel", max_position_embeddings=32)
    largest = max(each.nbytes for each in model.encoder.parameters())
    embeddings = sum(each.nbytes for each in model.embeddings.parameters())
    layers = sum(each.nbytes for each in model.encoder.parameters())
    model.save_pretrained(tmp_path / "float")
    fastattn.quantize(model, "int8")
    model.save_pretrained(tmp_path / "quantized")
    del model
    gc.collect()
    # Only what is made from here on is looked through.
    gc.freeze()
    held = []

    def watched(function):
        def call(*args):
            held.append(float_matrices())
            return function(*args)

        return call

    for name in ("filled", "settle"):
        monkeypatch.setattr(loading, name, watched(getattr(loading, name)))
    options = dict(quantization_config=FastattnConfig("int8"))
    try:
        models = [transformers.BertModel.from_pretrained(tmp_path / "float", **options)]
        models.append(transformers.BertModel.from_pretrained(tmp_path / "quantized"))
    finally:
        gc.unfreeze()
    assert len(held) == 15
    # At most one layer's float weight at a time, and its quantizing's temporaries.
    assert max(held) <= 2 * embeddings + 3 * largest < layers
