"""Contenders in PyTorch: built from copies, decoding to the last token, training without dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_sources import MODELS, source_of

from fastattn.bench.contenders import BUILDERS, Stages, stamps, torch_models
from fastattn.bench.contenders.source import Source
from fastattn.bench.timing import MissingError
from fastattn.bench.workloads import Workload
from fastattn.swap import is_swapped

pytestmark = pytest.mark.model

RAGGED = Workload(4, 12, 0.6)


def built(source: Source, key: str, precision: str = "fp32") -> Any:
    return BUILDERS[key].build(source, precision, Stages())


def batch(source: Source, workload: Workload = RAGGED) -> dict[str, torch.Tensor]:
    return workload.tokens(99, avoid=getattr(source.model.config, "pad_token_id", None))  # type: ignore[union-attr]


def prompts() -> dict[str, torch.Tensor]:
    return Workload(2, 6).tokens(99)


def test_building_tells_what_it_took_once() -> None:
    source = source_of(MODELS["bert"]())
    for key, names in (("sdpa", ["load model"]), ("fastattn", ["swap", "load model"])):
        stages = Stages()
        BUILDERS[key].build(source, "fp32", stages)
        assert list(stages.times_ms) == names and all(value > 0 for value in stages.times_ms.values())


def test_each_contender_is_a_copy_that_runs_what_its_name_says() -> None:
    source = source_of(MODELS["bert"]())
    inputs = batch(source)
    for key, attention in (("eager", "eager"), ("sdpa", "sdpa")):
        runner = built(source, key, "bf16")
        assert runner.model.config._attn_implementation == attention and not is_swapped(runner.model)
        assert runner.forward(inputs).last_hidden_state.dtype == torch.bfloat16
    for key, left_out in (("fastattn", True), ("fastattn-padded", False)):
        runner = built(source, key)
        assert is_swapped(runner.model)
        # Positions that are not computed are zero.
        padding = runner.forward(inputs).last_hidden_state[inputs["attention_mask"] == 0]
        assert bool((padding == 0).all()) is left_out
    model: Any = source.model
    assert not is_swapped(model) and model.dtype == torch.float32 and not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("key", ["flex", "compile-reduce-overhead", "fastattn-graph"])
def test_what_takes_a_gpu_says_so_without_one(key: str) -> None:
    with pytest.raises(MissingError, match="GPU"):
        built(source_of(MODELS["bert"]()), key)


def test_an_attention_the_model_does_not_have_is_missing_and_not_a_failure() -> None:
    source = source_of(MODELS["bert"]())

    def without_sdpa() -> Any:
        model: Any = MODELS["bert"]()

        def refuse(name: str) -> None:
            raise ValueError(f"BertModel does not support {name}")

        model.set_attn_implementation = refuse
        return model

    source.untouched = without_sdpa
    with pytest.raises(MissingError, match="sdpa attention of BertModel: BertModel does not support sdpa"):
        built(source, "sdpa")


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("key", ["eager", "fastattn"])
def test_decoding_ignores_what_the_models_own_generation_config_asks_for(name: str, key: str) -> None:
    plain = source_of(MODELS[name]())
    expected = built(plain, key).generate(prompts(), 6).tokens
    model: Any = MODELS[name]()
    # Every token would end it, or be forced, or be drawn; and a length of its own.
    own = model.generation_config
    own.eos_token_id = sorted(set(expected.flatten().tolist()))
    own.forced_eos_token_id, own.num_beams, own.do_sample, own.max_length = 7, 2, True, 8
    own.repetition_penalty = 5.0
    before = own.to_dict()
    runner = built(source_of(model), key)
    generated = runner.generate(prompts(), 6)
    assert generated.tokens.shape == (2, 6) and torch.equal(generated.tokens, expected)
    assert model.generation_config is own and own.to_dict() == before
    assert len(generated.stamps_ms) == 6 and list(generated.stamps_ms) == sorted(generated.stamps_ms)
    assert generated.stamps_ms[0] > 0


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_logits_are_those_the_tokens_were_chosen_by(name: str) -> None:
    source = source_of(MODELS[name]())
    runner = built(source, "sdpa")
    inputs = batch(source)
    if name != "t5":
        inputs = {key: x.flip(1) for key, x in inputs.items()}
    tokens = runner.generate(inputs, 5).tokens
    logits = runner.logits(inputs, tokens)
    assert logits.shape == (4, 5, 99) and torch.equal(logits.argmax(-1), tokens)


def test_a_decoder_start_that_no_config_names_is_one_all_the_same() -> None:
    model: Any = MODELS["t5"]()
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    assert stamps.start_token(model) == 0
    assert built(source_of(model), "eager").generate(prompts(), 3).tokens.shape == (2, 3)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("key", ["sdpa", "fastattn"])
def test_training_is_the_same_every_time_and_leaves_inference_as_it_was(name: str, key: str) -> None:
    source = source_of(MODELS[name]())
    runner = built(source, key)
    inputs = batch(source)
    before = next(iter(dict(runner.forward(inputs)).values())).clone()
    labelled = dict(inputs)
    if name != "bert":
        labelled["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    first = runner.train_step(labelled)
    kept = {name: gradient.clone() for name, gradient in first.gradients.items()}
    assert runner.model.training and len(kept) > 10
    second = runner.train_step(labelled)
    # No dropout, and no gradient added to the last step's.
    assert torch.equal(first.loss, second.loss) and set(kept) == set(second.gradients)
    assert all(torch.equal(kept[name], gradient) for name, gradient in second.gradients.items())
    assert not first.gradients, "the last step's gradients are let go"
    after = next(iter(dict(runner.forward(inputs)).values()))
    assert torch.equal(before, after) and not runner.model.training
    assert not any(each.requires_grad or each.grad is not None for each in runner.model.parameters())


def test_a_loss_without_labels_gives_every_layer_a_gradient_that_is_not_rounding() -> None:
    source = source_of(MODELS["bert"]())
    runner = built(source, "eager")
    step = runner.train_step(batch(source))
    sizes = {name: float(gradient.abs().max()) for name, gradient in step.gradients.items()}
    weights = [name for name in sizes if name.endswith("weight") and "pooler" not in name]
    assert len(weights) > 10 and min(sizes[name] for name in weights) > 1e-5


def test_a_compiled_model_forwards_and_trains_as_the_untouched_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Dynamo without inductor: what this package adds is what is compiled, and the modes it then runs in.
    compile = torch.compile

    def traced(module: Any, **options: Any) -> Any:
        return compile(module, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(torch_models, "require_cpp_compiler", lambda: None)
    source = source_of(MODELS["bert"]())
    runner, plain = built(source, "compile"), built(source, "sdpa")
    inputs = batch(source)
    before, expected = runner.forward(inputs)[0], plain.forward(inputs)[0]
    torch.testing.assert_close(before, expected)
    step = runner.train_step(inputs)
    torch.testing.assert_close(dict(step.gradients), dict(plain.train_step(inputs).gradients))
    torch.testing.assert_close(runner.forward(inputs)[0], expected)
    torch._dynamo.reset()


def test_of_an_encoder_decoder_the_encoder_alone_is_compiled_to_encode() -> None:
    source = source_of(MODELS["t5"]())
    model: Any = source.untouched()
    called: list[Any] = []

    def compile(module: Any) -> Any:
        def call(**inputs: Any) -> Any:
            called.append(module)
            return module(**inputs)

        return call

    runner = torch_models.TorchRunner(model, "encoder-decoder", compile)
    assert runner.forward(batch(source)).last_hidden_state.shape == (4, 12, 32)
    assert called == [model.get_encoder()]


def test_a_compiled_model_does_not_decode_uncompiled_under_its_name() -> None:
    source = source_of(MODELS["gpt2"]())
    runner = torch_models.TorchRunner(source.untouched(), "decoder", lambda module: module)
    with pytest.raises(TypeError, match="would run uncompiled"):
        runner.generate(prompts(), 2)


def test_without_a_compiler_compiled_is_missing() -> None:
    """The compiler is looked up where torch.compile looks."""
    from torch._inductor import config

    missing = pytest.raises(MissingError, match=r"C\+\+ compiler")
    with config.patch({"cpp.cxx": ("no-such-compiler",)}), missing:
        built(source_of(MODELS["bert"]()), "compile")
    with config.patch({"cpp.cxx": ("echo",)}):
        torch_models.require_cpp_compiler()
