"""`fastattn.benchmark` on a small BERT: fair, honest, and without a trace on the user's model."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.bench import BenchmarkResult, MissingError, Workload
from fastattn.bench import contenders as contenders_module

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.model

RAGGED = Workload(4, 16, 0.5)


def small_bert(kind: str = "BertModel", seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        **options,
    )
    return getattr(transformers, kind)(config)


def quick(model: Any, **options: Any) -> BenchmarkResult:
    defaults: dict[str, Any] = {
        "workloads": RAGGED,
        "contenders": ["fastattn"],
        "dtypes": "fp32",
        "budget_s": 0.05,
    }
    return fastattn.benchmark(model, **(defaults | options))


@pytest.fixture(scope="module")
def result() -> BenchmarkResult:
    return quick(small_bert(), workloads=[RAGGED, Workload(1, 16)], dtypes=["fp32", "bf16"])


def test_every_workload_has_every_contender_with_parity_beside_its_ratio(result: BenchmarkResult) -> None:
    names = ["eager fp32", "SDPA fp32", "fastattn fp32", "SDPA bf16", "fastattn bf16"]
    assert [each.workload for each in result.measurements] == [RAGGED, Workload(1, 16)]
    for measurement in result.measurements:
        assert [row.name for row in measurement.rows] == names
        assert measurement.baseline is not None and measurement.baseline.name in names[:2]
        for row in measurement.rows:
            assert row.parity is not None and row.parity.passed, row
            assert (row.ratio is None) == row.baseline
            assert row.ratio is None or row.ratio.baseline == measurement.baseline.name
            assert len(row.wall_ms) >= 7
            assert row.parity.kind == ("parity" if row.dtype == "fp32" else "precision")
        assert measurement.row("fastattn fp32").parity.relative_error <= 1e-4  # type: ignore[union-attr]


def test_a_bf16_row_also_has_its_ratio_over_the_untouched_bf16_model(result: BenchmarkResult) -> None:
    row = result.measurements[0].row("fastattn bf16")
    assert row.against_ratio is not None and row.against_ratio.baseline == "SDPA bf16"
    assert result.measurements[0].row("fastattn fp32").against_ratio is None


def test_the_table_names_the_baseline_the_limits_and_the_method(result: BenchmarkResult) -> None:
    table = result.table()
    baseline = result.measurements[0].baseline
    assert baseline is not None and f"ratios are over {baseline.name}, the faster untouched model" in table
    assert "batch 4 x 16, 50% fill" in table and "95%" in table and "<= 1e-04" in table
    line = next(line for line in table.splitlines() if line.startswith("fastattn bf16"))
    assert "precision" in line


@pytest.mark.parametrize(("load", "busy"), [(0.3, False), (6.2, True), (None, False)])
def test_a_busy_machine_is_said_first(result: BenchmarkResult, load: float | None, busy: bool) -> None:
    cpu = result.environment["cpu"] | {"load_average": load, "usable_cores": 2}
    measured = replace(result, environment=result.environment | {"cpu": cpu})
    assert ("load 6.2 on 2 cores" in measured.table().splitlines()[2]) == busy
    assert bool(measured.to_dict()["warnings"]) == busy


def test_json_round_trips_and_has_the_samples(result: BenchmarkResult, tmp_path: Path) -> None:
    path = result.write_json(tmp_path / "result.json")
    loaded = json.loads(path.read_text(encoding="utf-8"))
    assert loaded == result.to_dict()
    assert loaded["schema"] == "fastattn.benchmark/1"
    row = loaded["measurements"][0]["rows"][2]
    assert row["name"] == "fastattn fp32" and len(row["wall_ms"]) == len(row["cpu_ms"]) >= 7
    assert row["parity"]["passed"] is True and row["ratio"]["level"] == 0.95
    assert sum(loaded["measurements"][0]["workload"]["lengths"]) == 32


def test_the_page_shows_what_the_table_shows(result: BenchmarkResult, tmp_path: Path) -> None:
    html = result.write_html(tmp_path / "result.html").read_text(encoding="utf-8")
    ratio = result.measurements[0].row("fastattn fp32").ratio
    assert ratio is not None and str(ratio) in html
    assert "Environment" in html and torch.__version__ in html


def snapshot(model: Any) -> dict[str, Any]:
    config = model.config
    return {
        "classes": [type(module) for module in model.modules()],
        "parameters": {
            name: (id(each), each.data_ptr(), each._version) for name, each in model.named_parameters()
        },
        "flags": [(module.training, sorted(module.__dict__)) for module in model.modules()],
        "grads": [each.requires_grad for each in model.parameters()],
        "config": (id(config), copy.deepcopy(config.to_dict()), config._attn_implementation),
    }


@pytest.mark.parametrize("swapped", [False, True])
def test_the_users_model_comes_back_as_it_was(swapped: bool) -> None:
    model = small_bert().train()
    if swapped:
        fastattn.optimize(model)
    before = snapshot(model)
    random_state = torch.random.get_rng_state()
    measured = quick(model, dtypes=["fp32", "bf16"])
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), random_state)
    assert measured.settings["model_was_swapped"] is swapped
    assert {row.status for row in measured.measurements[0].rows} == {"measured"}


def test_contenders_do_not_change_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of one model share no config: every contender still runs as it was built."""
    built: dict[str, Any] = {}

    def remember(model: Any) -> Any:
        built[f"{model.config._attn_implementation} {model.dtype}"] = model
        return lambda inputs: model(**inputs)

    monkeypatch.setattr(contenders_module, "_forward", remember)
    model = small_bert()
    quick(model, dtypes=["fp32", "bf16"])
    assert set(built) == {
        f"{kind} torch.{dtype}"
        for kind, dtype in [
            ("eager", "float32"),
            ("sdpa", "float32"),
            ("fastattn", "float32"),
            ("sdpa", "bfloat16"),
            ("fastattn", "bfloat16"),
        ]
    }
    for name, each in built.items():
        assert f"{each.config._attn_implementation} {each.dtype}" == name
        configs = {id(module.config) for module in each.modules() if hasattr(module, "config")}
        assert configs == {id(each.config)}, name
    pointers = [each.get_input_embeddings().weight.data_ptr() for each in [model, *built.values()]]
    assert len(set(pointers)) == len(pointers)


def test_a_swapped_model_is_compared_with_its_restored_self(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_bert()
    fastattn.optimize(model, exclude=["encoder.layer.1.*"])
    seen: list[Any] = []
    forward = contenders_module._forward
    monkeypatch.setattr(contenders_module, "_forward", lambda each: (seen.append(each), forward(each))[1])
    quick(model)
    reference, untouched, ours = seen
    assert {type(module) for module in ours.modules()} == {type(module) for module in model.modules()}
    for each in (reference, untouched):
        assert not any(type(module).__module__.startswith("fastattn") for module in each.modules())


def test_a_wrong_answer_is_shown_without_a_speed_up() -> None:
    result = quick(small_bert(seed=0), reference=small_bert(seed=1))
    row = result.measurements[0].row("fastattn fp32")
    assert row.status == "wrong" and row.ratio is None and row.parity is not None and not row.parity.passed
    line = next(line for line in result.table().splitlines() if line.startswith("fastattn fp32"))
    assert "wrong answer" in line and "x (" not in line
    assert result.measurements[0].sentences() == []


def test_a_contender_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(source: Any, dtype: str) -> Any:
        raise RuntimeError("the exporter fell over")

    def missing() -> None:
        raise MissingError("C++ compiler")

    monkeypatch.setitem(contenders_module.BUILDERS, "onnx", ("fastattn ONNX", broken))
    monkeypatch.setattr(contenders_module, "require_cpp_compiler", missing)
    result = quick(small_bert(), contenders=["compile", "fastattn", "onnx"])
    rows = {row.name: row for row in result.measurements[0].rows}
    assert rows["torch.compile fp32"].reason == "missing: C++ compiler"
    assert "the exporter fell over" in rows["fastattn ONNX fp32"].reason
    assert rows["fastattn fp32"].ratio is not None or rows["fastattn fp32"].baseline
    assert "missing: C++ compiler" in result.table()


def test_the_compiler_is_looked_up_where_torch_compile_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(MissingError, match=r"C\+\+ compiler"):
        contenders_module.require_cpp_compiler()
    monkeypatch.setattr(config.cpp, "cxx", ("echo",))
    contenders_module.require_cpp_compiler()


def test_a_model_with_nothing_to_swap_is_a_row_that_says_so() -> None:
    torch.manual_seed(0)
    config = transformers.XLMConfig(
        vocab_size=200, emb_dim=32, n_layers=1, n_heads=2, max_position_embeddings=32
    )
    row = quick(transformers.XLMModel(config)).measurements[0].row("fastattn fp32")
    assert row.status == "missing" and "layers to swap" in row.reason


def test_task_heads_are_measured_too() -> None:
    row = quick(small_bert("BertForSequenceClassification")).measurements[0].row("fastattn fp32")
    assert row.parity is not None and row.parity.passed and row.parity.output == "logits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda"),
        ({"contenders": ["fastest"]}, "contenders names 'fastest'; it must be out of eager, sdpa, compile"),
        ({"contenders": []}, "contenders is empty"),
        ({"dtypes": ["int4"]}, "dtypes names 'int4'; it must be out of fp32, bf16, fp16"),
        ({"workloads": Workload(1, 64)}, "64 tokens a sequence; the model takes at most 32"),
        ({"workloads": "all"}, "workloads is 'all'"),
        ({"workloads": []}, "it must be .auto., a Workload"),
        ({"budget_s": 0}, "budget_s is 0; it must be more than 0"),
    ],
)
def test_a_wrong_argument_is_refused_before_work_starts(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quick(small_bert(), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what happens without a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="no CUDA or ROCm device is visible"):
        quick(small_bert(), device="cuda")


def test_what_takes_no_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear cannot be given tokens"):
        quick(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"it must be a torch\.nn\.Module"):
        quick("bert")
    bart = transformers.BartModel(
        transformers.BartConfig(
            vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="BartModel is an encoder-decoder"):
        quick(bart)
