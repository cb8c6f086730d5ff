"""`fastattn.benchmark` on a small BERT: fair, honest, and without a trace on the user's model."""

from __future__ import annotations

import copy
import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.bench import BenchmarkResult, MissingError, Workload
from fastattn.bench.contenders import BUILDERS, Builder, Runner, torch_models
from fastattn.bench.contenders.torch_models import TorchRunner

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
            assert len(row.wall_ms) >= 7 and row.first_call_ms is not None and "load model" in row.stages_ms
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
    assert loaded["schema"] == "fastattn.benchmark/2"
    row = loaded["measurements"][0]["rows"][2]
    assert row["name"] == "fastattn fp32" and len(row["wall_ms"]) == len(row["cpu_ms"]) >= 7
    assert row["parity"]["passed"] is True and row["ratio"]["level"] == 0.95
    assert sum(loaded["measurements"][0]["workload"]["lengths"]) == 32


def test_the_page_shows_what_the_table_shows(result: BenchmarkResult, tmp_path: Path) -> None:
    html = result.write_html(tmp_path / "result.html").read_text(encoding="utf-8")
    ratio = result.measurements[0].row("fastattn fp32").ratio
    assert ratio is not None and str(ratio) in html
    assert "Environment" in html and torch.__version__ in html and "padding removal" in html


def test_csv_and_markdown_have_every_row(result: BenchmarkResult, tmp_path: Path) -> None:
    with open(result.write_csv(tmp_path / "rows.csv"), newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["contender"] for line in lines] == [
        row.name for each in result.measurements for row in each.rows
    ]
    text = result.write_markdown(tmp_path / "rows.md").read_text(encoding="utf-8")
    assert all(f"| {line['contender']} |" in text for line in lines)


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


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every model that a PyTorch contender is made of, in order."""
    models: list[Any] = []
    begin = TorchRunner.__init__

    def remember(self: TorchRunner, model: Any, *arguments: Any, **options: Any) -> None:
        models.append(model)
        begin(self, model, *arguments, **options)

    monkeypatch.setattr(TorchRunner, "__init__", remember)
    return models


def test_contenders_do_not_change_each_other(built: list[Any]) -> None:
    """Copies of one model share no config: every contender still runs as it was built."""
    model = small_bert()
    quick(model, dtypes=["fp32", "bf16"])
    assert [f"{each.config._attn_implementation} {each.dtype}" for each in built] == [
        "eager torch.float32",
        "sdpa torch.float32",
        "fastattn torch.float32",
        "sdpa torch.bfloat16",
        "fastattn torch.bfloat16",
    ]
    for each in built:
        assert {id(m.config) for m in each.modules() if hasattr(m, "config")} == {id(each.config)}
    pointers = [each.get_input_embeddings().weight.data_ptr() for each in [model, *built]]
    assert len(set(pointers)) == len(pointers)


def test_a_swapped_model_is_compared_with_its_restored_self(built: list[Any]) -> None:
    model = small_bert()
    fastattn.optimize(model, exclude=["encoder.layer.1.*"])
    quick(model)
    reference, untouched, ours = built
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


class Broken(Runner):
    """Built, and then fails in the way it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def forward(self, inputs: Any) -> Any:
        raise self.error


def replaced(monkeypatch: pytest.MonkeyPatch, key: str, make: Any) -> None:
    """`make()` instead of the contender `key`."""

    class Fake(Builder):
        def build(self, *_: Any) -> Runner:
            return make()

    monkeypatch.setitem(BUILDERS, key, Fake(BUILDERS[key].label, "", precisions=BUILDERS[key].precisions))


def test_a_contender_that_fails_is_a_row_and_the_rest_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing() -> None:
        raise MissingError("C++ compiler")

    monkeypatch.setattr(torch_models, "require_cpp_compiler", missing)
    replaced(monkeypatch, "onnx", lambda: Broken(RuntimeError("the session fell over\nat length")))
    replaced(monkeypatch, "onnx-int8", lambda: Broken(MemoryError("Unable to allocate 3 TiB")))
    # No folder can be made below a file: the export has nowhere to write.
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(blocked))
    names = ["compile", "fastattn", "onnx", "onnx-int8", "onnx-int4-weight"]
    result = quick(small_bert(), contenders=names)
    rows = {row.name: row for row in result.measurements[0].rows}
    assert rows["torch.compile fp32"].reason == "missing: C++ compiler"
    assert rows["fastattn ONNX fp32"].reason == "RuntimeError: the session fell over"
    assert rows["fastattn ONNX int8"].reason == "out of memory: Unable to allocate 3 TiB"
    assert rows["fastattn ONNX int4-weight"].status == "failed"
    assert "NotADirectoryError" in rows["fastattn ONNX int4-weight"].reason
    assert rows["fastattn fp32"].status == "measured" and rows["fastattn fp32"].wall_ms
    assert "C++ compiler" in result.table().partition("not measured")[2]


def test_a_shape_without_a_reference_is_rows_that_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention may not fit where SDPA does; and where neither does, the next workload goes on."""
    forward = TorchRunner.forward

    def limited(self: TorchRunner, inputs: Any) -> Any:
        rows, length = inputs["input_ids"].shape
        if length == 32 and (rows == 2 or self.model.config._attn_implementation == "eager"):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")
        return forward(self, inputs)

    monkeypatch.setattr(TorchRunner, "forward", limited)
    result = quick(small_bert(), workloads=[Workload(2, 32), Workload(1, 32), RAGGED])
    none, sdpa, all_of_them = result.measurements
    assert {row.status for row in none.rows} == {"failed"}
    assert all("no reference to compare with" in row.reason for row in none.rows)
    assert "out of memory" in none.rows[0].reason
    assert sdpa.reference == "SDPA fp32" and sdpa.row("eager fp32").status == "failed"
    assert sdpa.row("fastattn fp32").parity is not None and sdpa.row("fastattn fp32").parity.passed
    assert all_of_them.reference == "eager fp32"
    assert {row.status for row in all_of_them.rows} == {"measured"}


def test_ctrl_c_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = TorchRunner.forward
    calls = 0

    def pressed(self: TorchRunner, inputs: Any) -> Any:
        nonlocal calls
        calls += inputs["input_ids"].shape[1] == 8
        if calls == 15:
            raise KeyboardInterrupt
        return forward(self, inputs)

    monkeypatch.setattr(TorchRunner, "forward", pressed)
    result = quick(small_bert(), workloads=[RAGGED, Workload(4, 8), Workload(1, 16)], budget_s=60, until=0.9)
    assert result.interrupted and result.to_dict()["interrupted"] is True
    assert [each.workload for each in result.measurements] == [RAGGED, Workload(4, 8)]
    assert {row.status for row in result.measurements[0].rows} == {"measured"}
    assert "Interrupted" in result.table()


def test_every_task_of_a_decoder() -> None:
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    )
    workloads = [
        Workload(1, 8, task="prefill"),
        Workload(2, 8, 0.7, task="decode", new_tokens=4),
        Workload(2, 8, task="train"),
    ]
    result = quick(model, workloads=workloads, contenders=["fastattn", "openvino"])
    for measurement in result.measurements:
        ours = measurement.row("fastattn fp32")
        assert ours.parity is not None and ours.parity.passed and ours.wall_ms
        assert measurement.row("OpenVINO fp32").reason.startswith("missing: ")
    decoded, trained = (each.row("fastattn fp32").parts_ms for each in result.measurements[1:])
    assert len(decoded["inter_token_ms"]) == 3 * len(decoded["first_token_ms"])
    assert {"forward_ms", "backward_ms"} <= trained.keys()
    assert "first token ms" in result.table()
    with pytest.raises(ValueError, match="of kind 'decoder', can be asked: prefill, decode, train"):
        quick(model, workloads=Workload(2, 8))


def test_the_analyses_are_there_when_asked_for(tmp_path: Path) -> None:
    result = quick(
        small_bert(),
        contenders=["fastattn-padded", "fastattn"],
        workloads=Workload(2, 16, 0.5),
        with_roofline=True,
        scaling_axes=["fill"],
    )
    assert [each.name for each in result.attributions[0].steps][:2] == ["kernels", "padding removal"]
    assert any(point.cost.flop > 0 for each in result.rooflines for point in each.points)
    assert [point.value for point in result.scalings[0].curves[0].points] == [0.25, 0.5, 0.75, 1.0]
    plain = json.loads(result.write_json(tmp_path / "all.json").read_text(encoding="utf-8"))
    assert plain["rooflines"] and plain["scalings"] and plain["attributions"]
    text = result.table()
    assert "roofline, " in text and "scaling with fill" in text and "what it is due to" in text


def test_a_model_with_nothing_to_swap_is_a_row_that_says_so() -> None:
    torch.manual_seed(0)
    config = transformers.XLMConfig(
        vocab_size=200, emb_dim=32, n_layers=1, n_heads=2, max_position_embeddings=32
    )
    row = quick(transformers.XLMModel(config)).measurements[0].row("fastattn fp32")
    assert row.status == "missing" and "layers to swap" in row.reason


def test_task_heads_are_measured_too() -> None:
    model, workload = small_bert("BertForSequenceClassification"), Workload(4, 16, 0.5, task="classify")
    row = quick(model, workloads=workload).measurements[0].row("fastattn fp32")
    assert row.parity is not None and row.parity.passed and row.parity.output == "logits"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'; it must be one of auto, cpu, cuda"),
        ({"contenders": ["fastest"]}, "contenders names 'fastest'; it must be out of eager, sdpa, flex"),
        ({"contenders": []}, "contenders is empty"),
        ({"dtypes": ["int4"]}, "dtypes names 'int4'; it must be out of fp32, bf16, fp16"),
        ({"workloads": Workload(1, 64)}, "64 tokens a sequence; the model takes at most 32"),
        ({"workloads": "all"}, "workloads is 'all'"),
        ({"workloads": []}, "it must be .auto., a Workload"),
        ({"workloads": Workload(1, 8, task="prefill")}, "of kind 'encoder', can be asked: encode, train"),
        ({"budget_s": 0}, "budget_s is 0; it must be more than 0"),
        ({"until": 2.0}, "until is 2.0; it must be a fraction"),
        ({"scaling_axes": ["depth"]}, "scaling_axes names 'depth'; it must be out of length, batch, fill"),
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
