"""The user's model stays the user's: in place, reversible, idempotent, and everything one does with a model
still works.
"""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn

import fastattn
from fastattn.swap import is_swapped, plan
from fastattn.verification import adversarial_batches

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model


@pytest.fixture
def model(bert_config):
    return transformers.BertForSequenceClassification(bert_config).eval()


def run(model, case="right padding"):
    with torch.no_grad():
        return model(**adversarial_batches(model)[case]).logits


def fingerprint(model):
    """Everything about a model that restore must bring back, by identity where identity counts."""
    return (
        [(name, type(module)) for name, module in model.named_modules()],
        [(name, id(p), p.data_ptr(), p.untyped_storage().nbytes()) for name, p in model.named_parameters()],
        [(name, id(b)) for name, b in model.named_buffers()],
        [id(module.__dict__.get("config")) for module in model.modules()],
        [sorted(module.__dict__) for module in model.modules()],
        {name: list(module._forward_hooks) for name, module in model.named_modules()},
        copy.deepcopy(model.config).to_dict(),
        model.config._attn_implementation,
    )


def test_report_names_every_layer(model):
    report = fastattn.optimize(model)
    rows = report.to_dict()["sites"]
    assert {row["status"] for row in rows} == {"swapped"}
    assert {
        "name": "bert.encoder.layer.1.attention.self",
        "kind": "attention",
        "status": "swapped",
        "reason": "",
    } in rows
    assert [row["kind"] for row in rows].count("residual_norm") == 6
    assert "residual_norm  swapped       6" in report.table()


def test_restore_leaves_everything_as_it_was(model):
    before, outputs = fingerprint(model), run(model)
    fastattn.optimize(model)
    assert is_swapped(model) and fingerprint(model) != before
    fastattn.restore(model)
    assert fingerprint(model) == before
    assert torch.equal(run(model), outputs)
    fastattn.restore(model)
    assert fingerprint(model) == before


def test_swapping_keeps_parameters_state_dict_and_class_names(model):
    parameters = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]
    names = [type(module).__name__ for module in model.modules()]
    keys = list(model.state_dict())
    top = type(model)
    fastattn.optimize(model)
    assert parameters == [(name, id(p), p.data_ptr()) for name, p in model.named_parameters()]
    assert names == [type(module).__name__ for module in model.modules()]
    assert keys == list(model.state_dict())
    assert type(model) is top


def test_twice_equals_once(model):
    first = fastattn.optimize(model)
    config, once = model.config, fingerprint(model)
    second = fastattn.optimize(model)
    assert fingerprint(model) == once and model.config is config
    assert first.to_dict() == second.to_dict()
    fastattn.restore(model)
    assert not is_swapped(model)


def test_optimized_context(model):
    before = fingerprint(model)
    with fastattn.optimized(model) as inside:
        assert inside is model and is_swapped(model)
    assert fingerprint(model) == before
    with pytest.raises(RuntimeError, match="mine"), fastattn.optimized(model):
        raise RuntimeError("mine")
    assert fingerprint(model) == before
    fastattn.optimize(model)
    with fastattn.optimized(model):
        pass
    assert is_swapped(model)


def test_plan_changes_nothing(model):
    before = fingerprint(model)
    report = plan(model)
    assert fingerprint(model) == before
    assert report.to_dict() == fastattn.optimize(model).to_dict()


def test_two_models_from_one_config_are_independent(bert_config):
    first, second = (transformers.BertModel(bert_config).eval() for _ in range(2))
    second.load_state_dict(first.state_dict())
    fastattn.optimize(first)
    assert not is_swapped(second)
    assert second.config is bert_config and second.config._attn_implementation == "sdpa"
    batch = adversarial_batches(second)["right padding"]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        torch.testing.assert_close(
            first(**batch).last_hidden_state[mask],
            second(**batch).last_hidden_state[mask],
            rtol=1e-4,
            atol=1e-5,
        )


def test_a_config_changed_in_between_is_kept_by_restore(model):
    original = model.config
    fastattn.optimize(model)
    model.resize_token_embeddings(420)
    model.config.id2label = {0: "no", 1: "yes"}
    fastattn.restore(model)
    assert model.config is original
    assert model.config.vocab_size == 420 and model.config.id2label == {0: "no", 1: "yes"}
    assert model.config._attn_implementation == "sdpa"


def test_deepcopy_is_swapped_and_restores_alone(model):
    expected = run(model)
    fastattn.optimize(model)
    duplicate = copy.deepcopy(model)
    assert is_swapped(duplicate) and duplicate.config is not model.config
    assert torch.equal(run(duplicate), run(model))
    fastattn.restore(duplicate)
    assert torch.equal(run(duplicate), expected)
    assert is_swapped(model)


def test_torch_save_and_load(model):
    fastattn.optimize(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert is_swapped(loaded) and torch.equal(run(loaded), run(model))
    fastattn.restore(loaded)
    torch.testing.assert_close(run(loaded), run(model))


def test_save_pretrained_is_what_the_untouched_model_saves(model, tmp_path):
    model.save_pretrained(tmp_path / "before")
    fastattn.optimize(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "after").eval()
    assert not is_swapped(loaded)
    torch.testing.assert_close(run(loaded), run(model))


def test_dtype_and_device_moves(model):
    fastattn.optimize(model)
    reference = copy.deepcopy(model)
    fastattn.restore(reference)
    model.bfloat16()
    reference.bfloat16()
    assert run(model).dtype == torch.bfloat16
    torch.testing.assert_close(run(model), run(reference), rtol=0.05, atol=0.02)
    model.to(torch.float32).to("cpu")
    assert run(model).dtype == torch.float32
    assert model.to("meta").bert.embeddings.word_embeddings.weight.is_meta


def test_load_state_dict_with_assign(model, bert_config):
    fastattn.optimize(model)
    other = transformers.BertForSequenceClassification(bert_config).eval()
    model.load_state_dict(other.state_dict(), assign=True)
    torch.testing.assert_close(run(model), run(other))


def test_lora_on_the_projections_is_computed(model):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["query", "value", "dense"], init_lora_weights=False)
    reference = copy.deepcopy(model)
    fastattn.optimize(model)
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(model, lora).eval()
    torch.manual_seed(3)
    expected = peft.get_peft_model(reference, lora).eval()
    batch = adversarial_batches(model)["right padding"]
    with torch.no_grad():
        torch.testing.assert_close(wrapped(**batch).logits, expected(**batch).logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(wrapped(**batch).logits, run(wrapped.unload()), atol=1e-4)


def test_swapping_a_lora_model(model):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["query", "dense"], init_lora_weights=False)
    ).eval()
    batch = adversarial_batches(model)["right padding"]
    with torch.no_grad():
        expected = wrapped(**batch).logits
        assert fastattn.optimize(wrapped).swapped > 0
        torch.testing.assert_close(wrapped(**batch).logits, expected, rtol=1e-4, atol=1e-5)
    wrapped.train()(**batch, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
    gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients.values())


def test_an_accelerate_hook_on_a_site_is_left_alone(model):
    accelerate = pytest.importorskip("accelerate")
    expected = run(model)
    calls = []

    class Counting(accelerate.hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    accelerate.hooks.add_hook_to_module(model.bert.encoder.layer[1].attention.self, Counting())
    accelerate.hooks.add_hook_to_module(model.bert.encoder.layer[0], Counting())
    report = fastattn.optimize(model)
    skipped = [site for site in report.sites if site.status == "skipped"]
    assert [site.name for site in skipped] == ["bert.encoder.layer.1.attention.self"]
    assert "accelerate" in skipped[0].reason and "runs padded" in report.table()
    torch.testing.assert_close(run(model), expected)
    assert sorted(calls) == ["BertLayer", "BertSelfAttention"]


def test_an_accelerate_hook_added_after_the_swap_runs(model):
    accelerate = pytest.importorskip("accelerate")
    expected = run(model)
    fastattn.optimize(model)
    accelerate.hooks.add_hook_to_module(model.bert.encoder.layer[1], accelerate.hooks.AlignDevicesHook("cpu"))
    torch.testing.assert_close(run(model), expected)
    accelerate.hooks.remove_hook_from_module(model.bert.encoder.layer[1])
    torch.testing.assert_close(run(model), expected)


def test_exclude(model):
    expected = run(model)
    report = fastattn.optimize(model, exclude=["*.layer.0.*", "bert.encoder.layer.1.output"])
    skipped = {site.name for site in report.sites if site.status == "skipped"}
    assert skipped == {
        "bert.encoder.layer.0.attention.self",
        "bert.encoder.layer.0.attention.output",
        "bert.encoder.layer.0.intermediate",
        "bert.encoder.layer.0.output",
        "bert.encoder.layer.1.output",
    }
    torch.testing.assert_close(run(model), expected)
    with pytest.raises(ValueError, match=r"'\*\.nothing', which no module"):
        fastattn.optimize(model, exclude=["*.nothing"])


def test_a_subclass_with_a_forward_of_its_own_is_left_alone(model):
    original = type(model.bert.encoder.layer[0].attention.self)

    class Mine(original):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            assert attention_mask is None or attention_mask.dim() == 4
            out, weights = super().forward(hidden_states, attention_mask, **kwargs)
            return out * 2, weights

    model.bert.encoder.layer[0].attention.self.__class__ = Mine
    expected = run(model)
    report = fastattn.optimize(model)
    (skipped,) = [site for site in report.sites if site.status == "skipped"]
    assert "subclass of BertSelfAttention" in skipped.reason
    torch.testing.assert_close(run(model), expected)


def test_changing_the_attention_implementation_after_the_swap(model):
    expected = run(model)
    fastattn.optimize(model)
    for implementation in ("eager", "sdpa", "fastattn"):
        model.set_attn_implementation(implementation)
        torch.testing.assert_close(run(model), expected)


def test_sentence_transformers_style_wrapper(bert_config):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([transformers.BertModel(bert_config)])

        def forward(self, **batch):
            return self.inner[0](**batch).last_hidden_state

    wrapper = Wrapper().eval()
    batch = adversarial_batches(wrapper.inner[0])["left padding"]
    mask = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = wrapper(**batch)
        report = fastattn.optimize(wrapper)
        assert report.swapped == 13 and report.sites[0].name.startswith("inner.0.")
        torch.testing.assert_close(wrapper(**batch)[mask], expected[mask], rtol=1e-4, atol=1e-5)
    fastattn.restore(wrapper)
    assert not is_swapped(wrapper)


def test_nothing_to_swap_is_reported(model):
    linear = nn.Linear(3, 3)
    report = fastattn.optimize(linear)
    (site,) = report.to_dict()["sites"]
    assert site["status"] == "skipped" and "no layer of a known family (albert," in site["reason"]
    assert type(linear) is nn.Linear and report.swapped == 0


@torch.no_grad()
def test_an_unknown_family_gets_its_attention_where_it_asks_the_interface():
    config = transformers.GraniteConfig(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_multiplier=0.3,
    )
    model = transformers.GraniteForCausalLM(config).eval()
    batch = adversarial_batches(model)["left padding"]
    before, expected = fingerprint(model), model(**batch).logits
    report = fastattn.optimize(model)
    assert [(site.kind, site.status) for site in report.sites] == [("attention", "swapped")] * 2
    assert "no known family" in report.notes[0] and "note: Granite" in report.table()
    assert model.config._attn_implementation == "fastattn"
    real = batch["attention_mask"].bool()
    found = model(**batch).logits
    assert (found - expected)[real].abs().max() <= 1e-4 * expected[real].abs().max()
    fastattn.restore(model)
    assert fingerprint(model) == before


def test_an_unknown_family_that_computes_its_own_attention_is_left_alone():
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, d_inner=64)
    model = transformers.XLNetModel(config)
    before = fingerprint(model)
    report = fastattn.optimize(model)
    assert report.swapped == 0 and "no attention layer that asks" in report.sites[0].reason
    assert fingerprint(model) == before


def test_quantized_linear_layers_are_called():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=90, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128
    )
    model = transformers.BertModel(config).eval()
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8, inplace=True)
    batch = adversarial_batches(model)["no padding"]
    with torch.no_grad():
        expected = model(**batch).last_hidden_state
        assert fastattn.optimize(model).swapped
        found = model(**batch).last_hidden_state
    # Their activations are quantized at run time: a rounding may fall the other way.
    assert (found - expected).abs().max() <= 2e-2 * expected.abs().max()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: fastattn.optimize("bert"), TypeError, "model is a str"),
        (lambda m: fastattn.optimize(m, mode="fast"), ValueError, "'auto', 'inference', 'training'"),
        (lambda m: fastattn.optimize(m, padding="none"), ValueError, "'auto', 'packed', 'padded'"),
        (lambda m: fastattn.optimize(m, cuda_graphs=True), ValueError, "cuda_graphs"),
        (lambda m: fastattn.optimize(torch.compile(nn.Linear(2, 2))), TypeError, "before torch.compile"),
        (lambda m: fastattn.optimize(torch.jit.script(nn.Linear(2, 2))), TypeError, "scripted"),
        (lambda m: fastattn.optimize(nn.DataParallel(m)), TypeError, "DataParallel"),
        (
            lambda m: fastattn.optimize(nn.Sequential(torch.compile(nn.Linear(2, 2)))),
            TypeError,
            "'0' is compiled",
        ),
        (
            lambda m: fastattn.optimize(nn.Sequential(torch.jit.script(nn.Linear(2, 2)))),
            TypeError,
            "'0' is scripted",
        ),
        (lambda m: fastattn.restore(3), TypeError, "model is a int"),
        (lambda m: fastattn.verify(m), ValueError, "no swapped layer"),
        (lambda m: fastattn.optimize(m, unknown=1), TypeError, "unknown"),
    ],
)
def test_bad_input_is_refused_and_changes_nothing(model, call, error, message):
    before = fingerprint(model)
    with pytest.raises(error, match=message):
        call(model)
    assert fingerprint(model) == before


def test_a_failing_optimize_leaves_the_model_as_it_was(model, monkeypatch):
    before, expected = fingerprint(model), run(model)
    from fastattn.models.bert import BertOutput

    calls = []
    original = nn.Module.__setattr__

    def failing(self, name, value):
        if name == "__class__" and value is BertOutput:
            calls.append(name)
            if len(calls) == 2:
                raise RuntimeError("half way")
        original(self, name, value)

    monkeypatch.setattr(nn.Module, "__setattr__", failing)
    with pytest.raises(RuntimeError, match="half way"):
        fastattn.optimize(model)
    monkeypatch.undo()
    assert fingerprint(model) == before
    assert torch.equal(run(model), expected)


def test_eight_threads_get_the_same_answers(model):
    fastattn.optimize(model)
    cases = ["right padding", "left padding", "no padding", "batch == length"] * 2
    expected = [run(model, case) for case in cases]
    found: dict[int, torch.Tensor] = {}

    def work(index):
        for _ in range(10):
            found[index] = run(model, cases[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, wanted in enumerate(expected):
        torch.testing.assert_close(found[index], wanted)


def test_a_thousand_shapes_leave_memory_flat(bert_config):
    psutil = pytest.importorskip("psutil")
    bert_config.num_hidden_layers = 1
    model = transformers.BertModel(bert_config).eval()
    fastattn.optimize(model)
    process = psutil.Process()
    generator = torch.Generator().manual_seed(0)

    def varied(count):
        for _ in range(count):
            batch, length = torch.randint(1, 9, (2,), generator=generator).tolist()
            length *= 6
            lengths = torch.randint(1, length + 1, (batch, 1), generator=generator)
            mask = torch.arange(length) < lengths
            with torch.no_grad():
                model(input_ids=torch.randint(0, 400, (batch, length)), attention_mask=mask)
        return process.memory_info().rss

    warm = varied(300)
    assert varied(1000) - warm < 24 * 2**20


def test_verify_names_the_worst_case(model):
    fastattn.optimize(model)
    reference = copy.deepcopy(model)
    fastattn.restore(reference)
    with torch.no_grad():
        model.classifier.bias += 0.1
    with pytest.raises(fastattn.VerificationError, match="logits has error") as error:
        fastattn.verify(model, reference)
    assert not error.value.report.passed and "FAILED" in error.value.report.table()
    with torch.no_grad():
        model.bert.encoder.layer[0].output.LayerNorm.weight[0] = float("nan")
    with pytest.raises(fastattn.VerificationError, match="not finite"):
        fastattn.verify(model, reference)


def test_verify_on_given_inputs_leaves_mode_and_gradients_alone(model):
    fastattn.optimize(model)
    model.train()
    model.bert.embeddings.eval()
    inputs = {"input_ids": torch.randint(0, 400, (2, 5))}
    report = fastattn.verify(model, inputs=inputs, cases=["given inputs", "gradients"])
    assert {result.case for result in report.results} == {"given inputs", "gradients"}
    assert model.training and not model.bert.embeddings.training
    assert all(p.grad is None for p in model.parameters())
