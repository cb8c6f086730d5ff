"""Bad input is named before work starts, and whatever goes wrong, the folder is as it was."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from batches import token_batch

import fastattn

pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import transformers

from fastattn.onnx import convert, exporter, rewrites, translations


@pytest.fixture
def model(new_bert):
    return new_bert(num_hidden_layers=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "int3"}, r"precision is 'int3'; it must be one of 'fp32', "),
        (
            {"precision": "fp16"},
            r"precision is 'fp16', which target 'cpu' does not run well; it takes 'fp32'",
        ),
        ({"target": "tpu"}, r"target is 'tpu'; it must be one of 'cpu', "),
        ({"layouts": "mine"}, r"layouts has 'mine'; a layout is one of "),
        (
            {"task": "masked-lm"},
            r"task is 'masked-lm', but BertModel has the head of 'feature-extraction'; load the model with "
            "AutoModelForMaskedLM, or leave task out",
        ),
        ({"task": "guessing"}, r"task is 'guessing', which is none of .*fill-mask"),
        ({"tokenizer": "bert"}, r"tokenizer is a str; it must have save_pretrained"),
        (
            {"example_inputs": {"input_ids": torch.ones(2, 3)}},
            r"example_inputs has \['input_ids'\]; it must have",
        ),
        (
            {"example_inputs": {**token_batch([3, 3], 3), "attention_mask": torch.ones(2, 3)}},
            r"must be an int64",
        ),
        ({"example_inputs": token_batch([1, 1], 1)}, r"every size at least 2"),
        ({"example_inputs": token_batch([3, 3], 2)}, r"no two equal"),
        ({"example_inputs": token_batch([9, 9], 99)}, r"at most 64; got input_ids \[2, 99\]"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments(model, tmp_path, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fastattn.export(model, tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_bad_models(new_bert, tmp_path):
    unknown = transformers.FNetModel(
        transformers.FNetConfig(hidden_size=8, num_hidden_layers=1, vocab_size=9)
    )
    families = "transformers models of these families are exported: albert, bart, bert, .*example_inputs"
    for model, message in (
        ("bert", "model is a str; a torch.nn.Module"),
        (torch.nn.Linear(2, 2), f"the model is a Linear; {families}"),
        (unknown, f"the model is a FNetModel; {families}"),
        (new_bert().to("meta"), "meta device"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            fastattn.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unsupported_family_by_an_example(tmp_path):
    """The other way that the error names."""
    config = transformers.LayoutLMConfig(
        vocab_size=50,
        hidden_size=24,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=40,
        max_position_embeddings=32,
        max_2d_position_embeddings=64,
    )
    model = transformers.LayoutLMModel(config).eval()
    example = {
        "input_ids": torch.arange(22).view(2, 11),
        "attention_mask": torch.ones(2, 11, dtype=torch.int64),
    }
    result = fastattn.export(model, tmp_path / "out", example_inputs=example)
    assert result.verification.passed
    assert result.task is None


def test_folder_that_cannot_be_written(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotADirectoryError, match="exists and is not a folder"):
        fastattn.export(model, tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written"):
        fastattn.export(model, tmp_path / "file" / "below")
    with pytest.raises(OSError, match="cannot be written"):
        fastattn.export(model, "/proc/fastattn-export")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_missing_optimum_is_named(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.exporters.tasks", None)
    with pytest.raises(ImportError, match=r'optimum, which names.*pip install "fastattn\[onnx\]"'):
        fastattn.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_missing_package_is_named(model, tmp_path, monkeypatch, package):
    from fastattn.onnx import requirements

    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == package else importlib.util.find_spec(name)
    )
    with pytest.raises(ImportError, match=rf'{package} not installed; pip install "fastattn\[onnx\]"'):
        fastattn.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_importing_needs_none_of_the_packages():
    """Nor torch: `import fastattn.onnx` only defines what to call."""
    program = (
        "import sys\n"
        "for name in ('onnx', 'onnxscript', 'onnxruntime', 'onnx_ir', 'transformers', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "import fastattn.onnx\n"
        "assert callable(fastattn.onnx.export) and callable(fastattn.onnx.load)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_wrong_export_is_refused_and_the_old_one_stays(model, tmp_path, monkeypatch):
    """A translation that is wrong never reaches the user's folder."""
    folder = tmp_path / "out"
    fastattn.export(model, folder, verify=False)
    before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
    right = translations.TRANSLATIONS[torch.ops.fastattn.add_layer_norm.default]

    def wrong(x, residual, weight, bias, eps, dropout_p, seed):
        return right(x, x, weight, bias, eps, dropout_p, seed)

    monkeypatch.setitem(translations.TRANSLATIONS, torch.ops.fastattn.add_layer_norm.default, wrong)
    with pytest.raises(
        fastattn.VerificationError, match=r"(last_hidden_state|pooler_output) has error"
    ) as caught:
        fastattn.export(model, folder)
    assert not caught.value.report.passed
    assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_fusion_that_stops_matching_fails(model, tmp_path, monkeypatch):
    monkeypatch.setattr(rewrites, "REWRITES", (rewrites.cancel_transposes, rewrites.shorten_views))
    with pytest.raises(convert.FusionError, match="1 bias_gelu operations 0 became fused nodes"):
        fastattn.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_weights_beside_the_graph_when_they_are_too_large(model, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "EXTERNAL_DATA_BYTES", 1000)
    folder = tmp_path / "deep" / "out"
    result = fastattn.export(model, folder, layouts=())
    assert "model.onnx.data" in result.files
    assert result.verification.passed
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    assert sum(len(tensor.raw_data) for tensor in proto.graph.initializer) < 10_000
    monkeypatch.undo()
    # Exporting again into the same folder leaves no file of the first export behind.
    (folder / "notes.txt").write_text("mine")
    fastattn.export(model, folder, verify=False, layouts=())
    assert sorted(e.name for e in folder.iterdir()) == [
        "config.json",
        "fastattn.json",
        "model.onnx",
        "notes.txt",
    ]
