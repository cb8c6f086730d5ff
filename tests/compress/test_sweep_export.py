"""Exported points of a sweep: made, scored and timed as ONNX graphs, refused before work, resumed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum")

import fastattn  # noqa: E402
from fastattn.bench import Workload  # noqa: E402
from fastattn.compress import sweep_run  # noqa: E402
from fastattn.compress.sweep_points import auto_points, named_points  # noqa: E402
from fastattn.compress.sweep_run import sweep  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "_TIMING_S", 0.02)


def classifier() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=64, num_attention_heads=4, intermediate_size=256, num_hidden_layers=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config).eval()


def encoder_decoder() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=64, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


BATCH = {"input_ids": torch.arange(4, 36).view(4, 8), "attention_mask": torch.ones(4, 8, dtype=torch.long)}


class Recorder:
    """An `evaluate` that keeps what it was called with."""

    def __init__(self) -> None:
        self.models: list[Any] = []
        self.logits: list[Tensor] = []

    def __call__(self, model: Any) -> float:
        self.models.append(model)
        with torch.inference_mode():
            self.logits.append(model(**BATCH).logits.clone())
        return float(len(self.models))


def test_an_exported_point_is_evaluated_timed_and_saved_as_its_graph(tmp_path: Path) -> None:
    recorder = Recorder()
    points: list[dict[str, Any]] = [
        {"export": "fp32"},
        {"prune": {"ffn": 0.5}},
        {"prune": {"ffn": 0.5}, "export": {"precision": "int8"}},
    ]
    result = sweep(classifier(), recorder, points, folder=tmp_path, workload=BATCH)
    assert [point.status for point in result.points] == ["measured"] * 4, result.table()
    if importlib.util.find_spec("plotly"):
        page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
        assert "pruned ffn 0.5, ONNX int8" in page and "Exports run in ONNX Runtime" in page
    names = [point.name for point in result.points]
    assert names == ["untouched", "ONNX fp32", "pruned ffn 0.5", "pruned ffn 0.5, ONNX int8"]
    assert [isinstance(model, nn.Module) for model in recorder.models] == [True, False, True, False]
    untouched, exported, pruned, small = recorder.logits
    # Parity of the graph with its own model; the loss of int8 is small beside that model's.
    torch.testing.assert_close(exported, untouched, atol=1e-5, rtol=1e-4)
    assert torch.cosine_similarity(small.flatten(), pruned.flatten(), dim=0) > 0.99
    for point in (result.points[1], result.points[3]):
        assert point.folder is not None and point.speed_up is not None
        files = list((tmp_path / point.folder).glob("*.onnx*"))
        assert point.model_bytes == sum(file.stat().st_size for file in files)
        again = fastattn.load(tmp_path / point.folder)
        assert torch.equal(again(**BATCH).logits, recorder.logits[result.points.index(point)])
    sizes = [point.model_bytes or 0 for point in result.points]
    assert 0 < sizes[3] < sizes[1]


@pytest.mark.once
def test_exports_are_read_back_and_replace_what_had_their_name(tmp_path: Path) -> None:
    model, recorder = classifier(), Recorder()
    first = sweep(model, recorder, [{"export": "fp32", "name": "x"}], folder=tmp_path, workload=BATCH)
    second = sweep(model, recorder, [{"export": "fp32", "name": "x"}], folder=tmp_path, workload=BATCH)
    assert len(recorder.models) == 2 and second.points == first.points
    other = sweep(model, recorder, [{"quantize": "int8", "name": "x"}], folder=tmp_path, workload=BATCH)
    assert len(recorder.models) == 3 and other.points[1].folder == first.points[1].folder
    # Not the graph that was there before.
    assert isinstance(fastattn.load(tmp_path / str(other.points[1].folder)), nn.Module)


def test_an_export_that_fails_verification_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastattn.onnx.checks import encoder

    expected = encoder._expected
    monkeypatch.setattr(
        encoder,
        "_expected",
        lambda source, batch: {name: x + 1 for name, x in expected(source, batch).items()},
    )
    points = [{"export": "fp32"}, {"name": "fused"}]
    result = sweep(classifier(), Recorder(), points, folder=tmp_path, workload=BATCH)
    failed = result.points[1]
    assert (failed.status, failed.folder) == ("failed", None)
    assert "VerificationError" in failed.reason and "logits has error" in failed.reason
    assert not (tmp_path / "models" / "onnx-fp32").exists()
    assert result.points[2].status == "measured"


@pytest.mark.parametrize("workload", [None, Workload(2, 8, 0.75)])
def test_an_encoder_decoder_is_timed_with_decoder_inputs_and_exports_quantized(
    tmp_path: Path, workload: Workload | None
) -> None:
    everything = {"prune": {"ffn": 0.5}, "quantize": "int8", "export": "fp32"}
    points: list[dict[str, Any]] = [everything if workload else {"name": "fused"}]
    result = sweep(encoder_decoder(), lambda model: 1.0, points, folder=tmp_path, workload=workload)
    assert [point.status for point in result.points] == ["measured"] * 2, result.table()


class Mixer(nn.Module):
    """A module of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)

    def forward(self, src: Tensor) -> Tensor:
        mixed: Tensor = self.layer(src)
        return mixed


@pytest.mark.once
def test_a_module_of_ones_own_is_traced_with_the_timed_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = {"src": torch.randn(3, 8, 32)}
    result = sweep(
        Mixer().eval(),
        lambda model: float((model(**batch) if isinstance(model, nn.Module) else model(**batch)[0]).sum()),
        [{"export": "fp32"}],
        folder=tmp_path,
        workload=batch,
    )
    untouched, exported = result.points
    assert exported.status == "measured" and exported.folder is not None, exported
    assert exported.score == pytest.approx(untouched.score, abs=1e-3)


@pytest.mark.once
@pytest.mark.parametrize(
    ("point", "message"),
    [
        ({"export": 8}, "a point's export is 8; a precision, or a mapping of fastattn.export's arguments"),
        (
            {"export": "int7"},
            "a point's export cannot be made: precision is 'int7'; it must be one of 'fp32'",
        ),
        ({"export": "fp16"}, "which target 'cpu' does not run well"),
        ({"export": {"target": "tpu"}}, "target is 'tpu'"),
        ({"export": {"precison": "int8"}}, "fastattn.export has no argument 'precison'; it has precision"),
        ({"export": {"output_dir": "x"}}, "has 'output_dir', which a sweep's point cannot give"),
        ({"export": {"calibration": []}}, "has 'calibration', which a sweep's point cannot give"),
        ({"export": "int8", "optimize": False}, "exported is always the fused layers"),
    ],
)
def test_exports_that_cannot_be_made_are_said_before_any_work(point: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        named_points([point])
    assert message in str(error.value)


@pytest.mark.once
def test_chosen_points_are_exported_where_the_model_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = auto_points(classifier(), recovers=True)
    exports = [each for each in chosen if "export" in each]
    assert {"export": "fp32"} in exports and {"export": "int8"} in exports
    pruned = [each["prune"] for each in chosen if "prune" in each and len(each) == 1]
    assert [each["prune"] for each in exports if "prune" in each] == pruned
    assert len(named_points(chosen)) == len(chosen) and json.dumps(chosen)
    assert not any("export" in each for each in auto_points(Mixer(), recovers=True))
    monkeypatch.setattr(
        "fastattn.compress.sweep_export.find_spec", lambda name: name != "onnxruntime" or None
    )
    assert not any("export" in each for each in auto_points(classifier(), recovers=True))
