"""Exports and the engines of others: each answers as the untouched model, or says what is missing."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_sources import MODELS, source_of

from fastattn.bench.contenders import BUILDERS, Runner, Source, Stages, optimum, ort_optimizer, requirements
from fastattn.bench.contenders import openvino as openvino_contender
from fastattn.bench.contenders.liger import LigerModel
from fastattn.bench.contenders.liger import _apply_function as liger_function
from fastattn.bench.contenders.liger import build as build_liger
from fastattn.bench.tasks import work_for
from fastattn.bench.timers import CpuTimer
from fastattn.bench.timing import MissingError
from fastattn.bench.workloads import Workload

ENCODE, CLASSIFY = Workload(3, 12, 0.6), Workload(3, 12, 0.6, task="classify")
PREFILL = Workload(3, 12, 0.6, task="prefill")
DECODE = Workload(3, 12, 0.6, task="decode", new_tokens=4)
# Prompts this different are decoded one after another by CTranslate2; of one length, together.
FULL_PREFILL, FULL_DECODE = (
    Workload(2, 8, task="prefill"),
    Workload(2, 8, task="decode", new_tokens=4),
)


@pytest.fixture
def new_source() -> Iterator[Any]:
    """Makes sources of tiny models by name, closed afterwards."""
    made: list[Source] = []

    def make(name: str) -> Source:
        made.append(source_of(MODELS[name]()))
        return made[-1]

    yield make
    for source in made:
        source.resources.close()


def built(source: Source, key: str) -> tuple[Runner, str, Stages]:
    builder, stages = BUILDERS[key], Stages()
    precision = builder.precisions[0]
    return builder.build(source, precision, stages), precision, stages


def assert_right(source: Source, runner: Runner, precision: str, *workloads: Workload) -> None:
    """Timed and checked as the harness does, against the untouched eager model."""
    reference = BUILDERS["eager"].build(source, "fp32", Stages())
    for workload in workloads:
        work = work_for(workload, source.model, source.kind, source.device)
        work.expect(reference)
        prepared = work.prepared(runner, precision)
        output = CpuTimer().sample(prepared.run, 1).output
        answer = output if prepared.answer is None else prepared.answer(output)
        figure = work.check(precision, answer, work.limit(precision, None))
        assert figure.passed, f"{workload}: {figure}"
        if workload.new_tokens:
            assert prepared.parts is not None
            parts = prepared.parts(output)
            gaps = parts["inter_token_ms"]
            assert len(gaps) == workload.new_tokens - 1 and min(gaps) >= 0 < parts["first_token_ms"][0]


@pytest.mark.parametrize(
    ("key", "model", "workloads"),
    [
        ("onnx", "bert-classifier", (CLASSIFY,)),
        ("onnx", "t5", (ENCODE, DECODE)),
        ("onnx-int8-weight", "gpt2", (PREFILL, DECODE)),
        ("transformers-onnx-int8", "bert", (ENCODE,)),
        ("ort-optimizer", "bert-classifier", (CLASSIFY,)),
        ("ort-int8", "bert", (ENCODE,)),
    ],
)  # fmt: skip
def test_exports_answer_as_the_untouched_model(
    key: str, model: str, workloads: tuple[Workload, ...], new_source: Any, capfd: Any
) -> None:
    source = new_source(model)
    runner, precision, stages = built(source, key)
    assert capfd.readouterr().out == "", "stdout belongs to `fastattn bench --json`"
    names = list(stages.times_ms)
    assert (names[0], names[-1]) == ("export", "load")
    assert_right(source, runner, precision, *workloads)


def test_openvino_answers_as_the_untouched_model(new_source: Any) -> None:
    pytest.importorskip("openvino")
    source = new_source("bert")
    runner, precision, stages = built(source, "openvino")
    assert list(stages.times_ms) == ["convert", "compile"]
    assert_right(source, runner, precision, ENCODE)


@pytest.mark.parametrize("key", ["ctranslate2", "ctranslate2-int8"])
@pytest.mark.parametrize(
    ("model", "workloads"),
    [
        ("bert", (ENCODE,)),
        ("gpt2", (PREFILL, DECODE, FULL_PREFILL, FULL_DECODE)),
        ("llama", (PREFILL, FULL_DECODE)),
        ("t5", (DECODE,)),
    ],
)  # fmt: skip
def test_ctranslate2_answers_as_the_untouched_model(
    key: str, model: str, workloads: tuple[Workload, ...], new_source: Any
) -> None:
    pytest.importorskip("ctranslate2")
    source = new_source(model)
    runner, precision, _ = built(source, key)
    assert_right(source, runner, precision, *workloads)


def test_ctranslate2_says_what_it_cannot_compute(new_source: Any) -> None:
    pytest.importorskip("ctranslate2")
    with pytest.raises(MissingError, match="head of BertForSequenceClassification"):
        built(new_source("bert-classifier"), "ctranslate2")
    electra = transformers.ElectraModel(
        transformers.ElectraConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    )
    with pytest.raises(MissingError, match="none for ElectraConfig"):
        built(source_of(electra), "ctranslate2")
    runner, *_ = built(new_source("t5"), "ctranslate2")
    with pytest.raises(MissingError, match="translations alone"):
        runner.forward({})


@pytest.mark.parametrize(
    ("key", "package", "way"),
    [
        ("onnx", "onnxruntime", r'pip install "fastattn\[onnx\]"'),
        ("onnx", "optimum", r'pip install "fastattn\[onnx\]"'),
        ("transformers-onnx", "onnxscript", r'pip install "fastattn\[onnx\]"'),
        ("ort-optimizer", "onnx", r'pip install "fastattn\[onnx\]"'),
        ("openvino", "openvino", "pip install openvino"),
        ("ctranslate2", "ctranslate2", "pip install ctranslate2"),
        ("liger", "liger_kernel", "pip install liger-kernel"),
    ],
)
def test_a_missing_package_is_named_with_the_way_to_get_it(
    key: str, package: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(MODELS["bert"]())
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == package else name)
    with pytest.raises(MissingError, match=f"^{package}: {way}$"):
        BUILDERS[key].build(source, "fp32", Stages())
    assert "folder" not in vars(source), "nothing is written before"


def test_what_this_machine_or_the_model_lacks_is_said_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(requirements, "find_spec", lambda name: name)
    source = source_of(MODELS["bert"]())
    monkeypatch.setattr(openvino_contender, "cpu_flags", lambda: {"avx2"})
    with pytest.raises(MissingError, match="bf16 on this processor"):
        BUILDERS["openvino-bf16"].build(source, "bf16", Stages())
    mpnet = transformers.MPNetModel(
        transformers.MPNetConfig(vocab_size=99, hidden_size=32, num_attention_heads=4, num_hidden_layers=1)
    )
    with pytest.raises(MissingError, match="fusions for mpnet"):
        ort_optimizer.build(source_of(mpnet), "fp32", Stages())
    with pytest.raises(MissingError, match="GPU"):
        build_liger(source, "fp32", Stages())
    source.device = torch.device("cuda")
    for key in ("onnx", "transformers-onnx", "ort-int8", "openvino", "ctranslate2"):
        with pytest.raises(MissingError, match="measured on the CPU"):
            built(source, key)


def test_liger_changes_no_model_but_its_own() -> None:
    """Its functions patch transformers' module as well, which the untouched contenders run."""
    from transformers.models.llama import modeling_llama

    source = source_of(MODELS["llama"]())
    original, used = modeling_llama.apply_rotary_pos_emb, []

    def rotary(*args: Any, **kwargs: Any) -> Any:
        used.append(1)
        return original(*args, **kwargs)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    class Norm(torch.nn.Module): ...

    def apply(model: Any) -> None:
        modeling_llama.apply_rotary_pos_emb = rotary
        modeling_llama.LlamaRMSNorm = Norm
        modeling_llama.LlamaForCausalLM.old_forward = modeling_llama.LlamaForCausalLM.forward

    before = dict(vars(modeling_llama))
    patched = LigerModel(source.untouched(), source.kind, apply)
    untouched = BUILDERS["eager"].build(source, "fp32", Stages())
    ids = Workload(2, 6).tokens(99)
    for runner, expected in ((untouched, 0), (patched, 2), (untouched, 2)):
        runner.forward(ids)
        assert len(used) == expected
    assert vars(modeling_llama) == before
    assert_right(source, patched, "fp32", PREFILL, DECODE)
    patched.train_step({**ids, "labels": ids["input_ids"]})
    assert vars(modeling_llama) == before


def test_liger_is_applied_by_the_type_of_the_model() -> None:
    liger = pytest.importorskip("liger_kernel.transformers")
    assert liger_function(MODELS["llama"]()) is liger.apply_liger_kernel_to_llama
    with pytest.raises(MissingError, match="Liger's kernels for bert"):
        liger_function(MODELS["bert"]())


def test_optimum_is_asked_for_by_its_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_source: Any
) -> None:
    source = new_source("bert")
    monkeypatch.setattr(optimum, "_CHECKOUT", tmp_path)
    monkeypatch.delenv(optimum.PYTHON, raising=False)
    with pytest.raises(MissingError, match=f"pip install .* name its Python in {optimum.PYTHON}"):
        built(source, "optimum")
    (tmp_path / "Makefile").touch()
    with pytest.raises(MissingError, match=r"make \.venv-optimum"):
        built(source, "optimum")
    monkeypatch.setenv(optimum.PYTHON, str(tmp_path / "none"))
    with pytest.raises(MissingError, match=str(tmp_path / "none")):
        built(source, "optimum")


def test_optimum_answers_from_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_source: Any
) -> None:
    """A worker without optimum in its stead: what is asked, what comes back, and who keeps the time."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        textwrap.dedent(
            """
            import json, pathlib, numpy
            def prepare(child):
                saved, exported, kind, threads = child.arguments
                config = json.loads((pathlib.Path(saved) / "config.json").read_text())
                assert list(pathlib.Path(saved).glob("*.safetensors")), saved
                assert config["rope_theta"] == 500.0 and config["rope_scaling"] is None, config
                with child.stage("load"):
                    pass
                child.versions["optimum"] = "2.1"
                def task(request, arrays):
                    ids = arrays["input_ids"]
                    if request["do"] == "forward":
                        return lambda: {"logits": ids[:, -1:, None] * numpy.ones(99)}
                    count = request["new_tokens"]
                    stamps_ms = [5.0 * (index + 1) for index in range(count)]
                    return lambda: ({"tokens": ids[:, -count:]}, {"stamps_ms": stamps_ms})
                return task
            """
        )
    )
    monkeypatch.setattr(optimum, "_WORKER", worker)
    monkeypatch.setenv(optimum.PYTHON, sys.executable)
    source = new_source("llama")
    config: Any = source.model.config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    runner, _, stages = built(source, "optimum")
    assert list(stages.times_ms) == ["save", "load"]
    assert stages.versions == {"optimum": "2.1"}
    ids = Workload(2, 6).tokens(99)
    sample = CpuTimer().sample(runner.forward_call(ids), 3)
    assert torch.equal(sample.output["logits"][:, 0, 7], ids["input_ids"][:, -1].double())
    assert 0 < sample.wall_s < 1
    generated = runner.generate(ids, 3)
    assert torch.equal(generated.tokens, ids["input_ids"][:, -3:]) and generated.stamps_ms == (
        5.0,
        10.0,
        15.0,
    )


@pytest.mark.parametrize(("model", "workloads"), [("bert", (ENCODE,)), ("gpt2", (PREFILL, DECODE))])
def test_optimum_answers_as_the_untouched_model(
    model: str, workloads: tuple[Workload, ...], new_source: Any
) -> None:
    source = new_source(model)
    try:
        runner, precision, _ = built(source, "optimum")
    except MissingError as error:
        pytest.skip(str(error))
    assert_right(source, runner, precision, *workloads)
