"""What a failed or repeated export leaves behind, what a lower precision loses, and what the summary says."""

from __future__ import annotations

import json

import pytest
import torch
from batches import assert_same_outputs, token_batch

import fastattn

pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from fastattn.onnx import exporter
from fastattn.onnx.checks import speed
from fastattn.verification.likeness import ROW_GATES


@pytest.fixture(autouse=True)
def _without_timing(monkeypatch, request):
    """Timing is one test's subject; the others need not wait for it."""
    if "speed" not in request.node.name:
        monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: None)


def snapshot(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_weights_beside_the_graph_and_back(new_bert, tmp_path, monkeypatch):
    model = new_bert().eval()
    monkeypatch.setattr(exporter, "EXTERNAL_DATA_BYTES", 0)
    result = fastattn.export(model, tmp_path)
    assert "model.onnx.data" in result.files
    assert result.size_bytes > sum(p.numel() for p in model.parameters()) * 4
    batch = token_batch([7, 3], 7)
    with torch.no_grad():
        expected = model(**batch)
    assert_same_outputs(fastattn.load(tmp_path)(**batch), expected, batch["attention_mask"])
    monkeypatch.undo()
    monkeypatch.setattr(speed, "measure_speed", lambda *_, **__: None)
    fastattn.export(model, tmp_path)
    data = tmp_path / "model.onnx.data"
    assert not data.exists() or data.stat().st_size == 0, "ExportedModel asks for an empty one"
    assert_same_outputs(fastattn.load(tmp_path)(**batch), expected, batch["attention_mask"])


def test_a_lost_weight_is_found_and_leaves_the_earlier_export(new_bert, tmp_path, monkeypatch):
    """The written file is what is compared, not the graph in memory."""
    model = new_bert().eval()
    fastattn.export(model, tmp_path, verify=False)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    before = snapshot(tmp_path)
    write = exporter._write_graphs

    def damaged(converted, *rest):
        (graph,) = converted.values()
        value = next(v for name, v in graph.model.graph.initializers.items() if "intermediate" in name)
        import onnx_ir

        value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.01)
        write(converted, *rest)

    monkeypatch.setattr(exporter, "_write_graphs", damaged)
    with pytest.raises(fastattn.VerificationError, match=r"accepted is 1\.00e-04"):
        fastattn.export(model, tmp_path)
    assert snapshot(tmp_path) == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(
        {name.split("/")[0] for name in before}
    )


def test_files_of_an_earlier_export_go_and_others_stay(new_bert, tmp_path):
    fastattn.export(new_bert(), tmp_path, verify=False)
    manifest = json.loads((tmp_path / "fastattn.json").read_text(encoding="utf-8"))
    (tmp_path / "old.onnx").write_bytes(b"x")
    manifest["files"] += ["old.onnx", "../outside.txt"]
    (tmp_path / "fastattn.json").write_text(json.dumps(manifest), encoding="utf-8")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("mine", encoding="utf-8")
    fastattn.export(new_bert(), tmp_path, verify=False)
    assert not (tmp_path / "old.onnx").exists()
    assert (
        (tmp_path / "notes.txt").read_text(encoding="utf-8") == outside.read_text(encoding="utf-8") == "mine"
    )
    outside.unlink()


def test_the_loss_of_precision_is_measured_and_gated(new_bert, tmp_path, monkeypatch):
    model = new_bert()
    result = fastattn.export(model, tmp_path / "int8", precision="int8")
    assert result.verification.passed
    assert ROW_GATES["int8"] <= result.loss["cosine_mean"] < 1
    assert result.decisions
    assert "cosine, mean" in result.table()
    manifest = json.loads((tmp_path / "int8" / "fastattn.json").read_text(encoding="utf-8"))
    assert manifest["verification"]["loss"] == result.loss
    assert manifest["decisions"] == list(result.decisions)
    monkeypatch.setitem(ROW_GATES, "int8", 1.0)
    with pytest.raises(fastattn.VerificationError, match=r"int8 must keep 1\.0"):
        fastattn.export(model, tmp_path / "strict", precision="int8")
    assert not (tmp_path / "strict").exists()


def test_a_reference_of_other_weights_is_what_loss_is_measured_from(new_bert, tmp_path):
    original, changed = new_bert(), new_bert()
    with torch.no_grad():
        changed.encoder.layer[0].output.dense.weight.zero_()
    same = fastattn.export(original, tmp_path / "same", reference=original)
    assert same.loss["cosine_min"] > 0.999999
    other = fastattn.export(changed, tmp_path / "other", reference=original)
    assert other.verification.passed, "parity is with the model's own weights"
    assert other.loss["cosine_mean"] < 0.999


def test_the_summary_tells_size_fusions_parity_and_speed(new_bert, tmp_path):
    result = fastattn.export(new_bert(), tmp_path)
    assert result.speed["pytorch_ms"] > 0
    assert result.speed["ratio"] == pytest.approx(result.speed["pytorch_ms"] / result.speed["export_ms"])
    table = result.table()
    for expected in ("size", "nodes", "fused packed_attention", "worst error", "speed", "fp32, for cpu"):
        assert expected in table
    assert result.to_dict()["speed"] == result.speed


def test_a_target_that_cannot_run_here_says_so_before_any_work(new_bert, tmp_path):
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime runs target cuda")
    with pytest.raises(ValueError, match=r"has no CUDAExecutionProvider .*verify=False"):
        fastattn.export(new_bert(), tmp_path / "out", target="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int3"}, "precision is 'int3'; it must be one of 'fp32', 'fp16'"),
        ({"target": "tpu"}, "target is 'tpu'; it must be one of 'cpu'"),
        ({"precision": "fp16"}, "'fp16', which target 'cpu' does not run well; .* is for 'cuda'"),
        ({"calibration": []}, "calibration is for precision 'int8'; precision is 'fp32'"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message, new_bert, tmp_path):
    with pytest.raises(ValueError, match=message):
        fastattn.export(new_bert(), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
