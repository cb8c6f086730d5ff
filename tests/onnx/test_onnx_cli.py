"""`fastattn export`: a folder that loads, a table or JSON, and exit statuses."""

from __future__ import annotations

import json

import pytest

import fastattn
from fastattn.cli import main

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.model


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
        (["--precision", "int4"], "precision is 'int4'"),
        (["--target", "cuda"], "target is 'cuda'"),
        (["--task", "fill-mask"], "has the head of 'token-classification'"),
    ):
        assert main(["export", str(saved), str(tmp_path / "out"), *arguments]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("fastattn export: ") and message in error
    assert main(["export", str(tmp_path / "nowhere"), str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_wrong_export_is_status_1(saved, tmp_path, capsys, monkeypatch):
    from fastattn.verification import comparison

    monkeypatch.setattr(comparison, "TOLERANCE", 0.0)
    assert main(["export", str(saved), str(tmp_path / "out")]) == 1
    assert "the exported file differs from the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
