"""Exported folders loaded, copied and damaged: what `fastattn.load` makes of each, or says of it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from batches import token_batch

import fastattn
from fastattn.onnx import exporter

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum")


@pytest.fixture
def folder(exported, tmp_path):
    """A copy to damage."""
    return shutil.copytree(exported[1], tmp_path / "copy")


def manifest_of(folder):
    return json.loads((folder / "fastattn.json").read_text())


def changed(folder, **changes):
    (folder / "fastattn.json").write_text(json.dumps({**manifest_of(folder), **changes}))
    return folder


def test_what_is_loaded(exported, exported_model):
    from optimum.modeling_base import OptimizedModel

    model, folder = exported
    assert isinstance(exported_model, OptimizedModel)
    assert type(exported_model).__name__ == "BertModel"
    kept = exported_model.config.to_diff_dict()
    assert kept == {**model.config.to_diff_dict(), "architectures": ["BertModel"]}
    assert exported_model.device == torch.device("cpu") and exported_model.dtype == torch.float32
    assert exported_model.main_input_name == model.main_input_name
    assert exported_model.name_or_path == str(folder)
    assert not exported_model.can_generate() and not hasattr(exported_model, "generate")
    assert exported_model.eval() is exported_model is exported_model.to("cpu").to(torch.float32)
    assert repr(exported_model).startswith("BertModel(") and "feature-extraction" in repr(exported_model)
    for place, message in (
        ("cuda", "runs on cpu, not on cuda"),
        (torch.float16, "computes in torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            exported_model.to(place)
    with pytest.raises(ValueError, match="cannot be trained"):
        exported_model.train()


def test_saved_again_it_is_the_same(exported_model, exported, tmp_path):
    from fastattn.onnx.runtime.pretrained import OnnxPretrainedModel

    target = tmp_path / "deep" / "copy"
    exported_model.save_pretrained(target)
    assert sorted(file.name for file in target.iterdir()) == sorted(
        file.name for file in exported[1].iterdir()
    )
    batch = token_batch([6, 3], 6)
    expected = exported_model(**batch)
    for loaded in (
        fastattn.load(target),
        OnnxPretrainedModel.from_pretrained(target),
        type(exported_model).from_pretrained(str(target)),
    ):
        assert type(loaded) is type(exported_model)
        assert torch.equal(loaded(**batch).pooler_output, expected.pooler_output)


def test_changes_of_the_config_are_saved(folder, tmp_path):
    loaded = fastattn.load(folder)
    loaded.config.id2label = {0: "good", 1: "bad"}
    loaded.save_pretrained(tmp_path / "again")
    assert fastattn.load(tmp_path / "again").config.id2label == {0: "good", 1: "bad"}


def test_saving_is_whole_or_not_at_all(folder, tmp_path):
    loaded = fastattn.load(folder)
    (folder / "model.onnx").unlink()
    with pytest.raises(ValueError, match=r"no longer has model\.onnx; nothing was saved"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is not a folder"):
        loaded.save_pretrained(tmp_path / "file")


def test_another_class_than_the_folder_holds(exported, new_bert, tmp_path):
    from fastattn.onnx.runtime.decoder import OnnxDecoder
    from fastattn.onnx.runtime.pretrained import OnnxPretrainedModel

    with pytest.raises(ValueError, match="holds a BertModel, which is no OnnxDecoder"):
        OnnxDecoder.from_pretrained(exported[1])
    new_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no fastattn\.json; fastattn\.export writes it"):
        OnnxPretrainedModel.from_pretrained(tmp_path)


def test_hub_names_are_looked_up_where_the_hub_keeps_them(exported, tmp_path, monkeypatch):
    """Offline: from the cache, and an error of huggingface_hub's that says so where it is not there."""
    import huggingface_hub

    from fastattn.onnx.runtime.pretrained import OnnxPretrainedModel

    asked = {}
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **kw: asked.update(kw, name=name) or str(exported[1]),
    )
    loaded = OnnxPretrainedModel.from_pretrained("someone/bert-onnx", revision="v1")
    assert type(loaded).__name__ == "BertModel"
    assert (asked["name"], asked["revision"]) == ("someone/bert-onnx", "v1")
    monkeypatch.undo()
    with pytest.raises(OSError):
        OnnxPretrainedModel.from_pretrained(
            "someone/not-here", local_files_only=True, cache_dir=str(tmp_path / "cache")
        )


def test_saved_model_is_loaded_from_safetensors_only(new_bert, tmp_path):
    model = new_bert("BertForSequenceClassification").eval()
    model.save_pretrained(tmp_path / "saved")
    loaded = fastattn.load(tmp_path / "saved")
    assert type(loaded) is transformers.BertForSequenceClassification
    assert not loaded.training
    batch = token_batch([6, 3], 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)
    for name in ("session_options", "provider"):
        with pytest.raises(ValueError, match=f"{name} is for exported folders"):
            fastattn.load(tmp_path / "saved", **{name: "x"})
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickled weights"):
        fastattn.load(tmp_path / "saved")


def test_folders_that_are_no_export(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        fastattn.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"neither an export .* it holds nothing"):
        fastattn.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"neither an export .* it holds model\.onnx"):
        fastattn.load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "7", '{"inputs": []}', '{"schema": 2}', '{"schema": "two"}'])
def test_damaged_manifests(folder, content):
    (folder / "fastattn.json").write_text(content)
    with pytest.raises(ValueError, match=r"fastattn\.json is damaged .* export the model again"):
        fastattn.load(folder)


def test_manifests_of_other_versions(folder):
    for schema, way_out in ((1, "export the model again"), (3, "update fastattn")):
        with pytest.raises(ValueError, match=f"is of schema {schema}, this version .* reads 2; {way_out}"):
            fastattn.load(changed(folder, schema=schema))


def test_manifests_that_say_what_cannot_be(folder):
    manifest = manifest_of(folder)
    without_outputs = {
        "model": {key: value for key, value in manifest["graphs"]["model"].items() if key != "outputs"}
    }
    for changes, message in (
        ({"graphs": without_outputs}, "its graph 'model' has no 'outputs'"),
        ({"graphs": {}}, "no graph"),
        ({"kind": "oracle"}, "is of kind 'oracle'; this version of fastattn runs encoder, vision, decoder"),
        ({"target": "moon"}, "exported for target 'moon', this version of fastattn runs cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.load(changed(folder, **{**manifest, **changes}))


def test_missing_and_truncated_files(folder):
    graph = folder / "model.onnx"
    content = graph.read_bytes()
    graph.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"model\.onnx cannot be loaded .* export the model again"):
        fastattn.load(folder)
    graph.unlink()
    with pytest.raises(ValueError, match=r"has no model\.onnx; export the model again"):
        fastattn.load(folder)
    graph.write_bytes(content)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read .* export the model again"):
        fastattn.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        fastattn.load(folder)
    (folder / "config.json").write_text(config)
    fastattn.load(folder)


def test_missing_weights_beside_the_graph(new_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "EXTERNAL_DATA_BYTES", 1000)
    fastattn.export(new_bert(num_hidden_layers=1), tmp_path, verify=False)
    fastattn.load(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ValueError, match=r"has no model\.onnx\.data, which holds the weights of model\.onnx"):
        fastattn.load(tmp_path)


def test_providers(folder):
    import onnxruntime

    loaded = fastattn.load(folder, provider="CPUExecutionProvider")
    assert loaded.session.get_providers() == ["CPUExecutionProvider"]
    with pytest.raises(ValueError, match=r"provider is 'Gpu'; the installed onnxruntime has .*CPUExecution"):
        fastattn.load(folder, provider="Gpu")
    changed(folder, target="cuda")
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the provider")
    with pytest.raises(
        ValueError,
        match=r"for target 'cuda', which runs on CUDAExecutionProvider; .* install onnxruntime-gpu",
    ):
        fastattn.load(folder)
    assert fastattn.load(folder, provider="CPUExecutionProvider").device.type == "cpu"


@pytest.mark.parametrize("package", ["onnxruntime", "optimum", "requests"])
def test_missing_package_is_named(exported, monkeypatch, package):
    from fastattn.onnx import requirements

    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == package else importlib.util.find_spec(name)
    )
    with pytest.raises(ImportError, match=rf'{package} not installed; pip install "fastattn\[onnx\]"'):
        fastattn.load(exported[1])


def test_a_module_of_ones_own_needs_onnxruntime_and_numpy_alone(tmp_path):
    fastattn.export(
        torch.nn.Sequential(torch.nn.Linear(5, 7)),
        tmp_path,
        example_inputs={"input": torch.zeros(2, 3, 5)},
        verify=False,
    )
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'optimum', 'onnx', 'onnx_ir', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "import fastattn, numpy\n"
        f"print(fastattn.load({str(tmp_path)!r})(numpy.zeros((4, 2, 5), numpy.float32))[0].shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "(4, 2, 7)", re.sub(r"\s+", " ", done.stderr)[-400:]
