"""`fastattn bench` and `fastattn env` as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    path = tmp_path_factory.mktemp("model")
    transformers.BertModel(config).save_pretrained(path)
    return path


def call(*arguments: Any) -> int:
    """The verbs through their own parsers, as the command dispatches to them."""
    import argparse

    from fastattn.cli import UserError, bench, env

    verb = {"bench": bench, "env": env}[arguments[0]]
    parser = argparse.ArgumentParser(exit_on_error=False)
    verb.add_arguments(parser)
    try:
        return verb.run(parser.parse_args([str(each) for each in arguments[1:]]))
    except (UserError, ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None


SMALL = ("--batch", "2", "--seq", "16", "--contenders", "fastattn", "--dtypes", "fp32", "--budget", "0.05")


def test_it_prints_a_table_and_writes_both_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, data = tmp_path / "page.html", tmp_path / "data.json"
    assert call("bench", folder, *SMALL, "--fill", "0.5", "--html", page, "--json", data) == 0
    output = capsys.readouterr().out
    assert "batch 2 x 16, 50% fill" in output and "fastattn fp32" in output
    assert json.loads(data.read_text(encoding="utf-8"))["settings"]["dtypes"] == ["fp32"]
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_csv_and_markdown_are_written(folder: Path, tmp_path: Path) -> None:
    rows, tables = tmp_path / "rows.csv", tmp_path / "tables.md"
    assert call("bench", folder, *SMALL, "--fill", "1", "--csv", rows, "--markdown", tables) == 0
    assert "fastattn" in rows.read_text(encoding="utf-8") and "| " in tables.read_text(encoding="utf-8")


def test_a_first_answer_comes_before_the_full_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastattn.cli import bench

    monkeypatch.setattr(bench, "_FIRST_ANSWER_S", 0.01)
    assert call("bench", folder, *SMALL, "--json") == 0
    captured = capsys.readouterr()
    assert "First answer" in captured.err and "batch 2 x 16, 47% fill" in captured.err
    assert len(json.loads(captured.out)["measurements"]) == 3


def test_ctrl_c_prints_and_writes_what_was_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastattn.bench.contenders.torch_models import TorchRunner

    forward = TorchRunner.forward

    def pressed(self: Any, inputs: Any) -> Any:
        if inputs["input_ids"].shape[0] == 1:
            raise KeyboardInterrupt
        return forward(self, inputs)

    monkeypatch.setattr(TorchRunner, "forward", pressed)
    data = tmp_path / "data.json"
    assert call("bench", folder, *SMALL, "--json", data) == 130
    assert "batch 2 x 16, 100% fill" in capsys.readouterr().out
    assert len(json.loads(data.read_text(encoding="utf-8"))["measurements"]) == 2


@pytest.mark.parametrize("runs_before", [0, 1])
def test_ctrl_c_before_the_full_answer_has_a_time_keeps_the_first_answer(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs_before: int
) -> None:
    """Pressed in the first answer's rounds, or while the contenders of the full one are made ready."""
    from fastattn.bench import model_benchmark, timing
    from fastattn.cli import bench

    monkeypatch.setattr(bench, "_FIRST_ANSWER_S", 0.01)
    measure, runs = model_benchmark.benchmark, []

    def counted(*args: Any, **options: Any) -> Any:
        runs.append(len(runs))
        return measure(*args, **options)

    monkeypatch.setattr("fastattn.benchmark", counted)
    prepare = timing.Trial.prepare
    taken = timing.Trial.take_sample

    def prepared(self: Any, *args: Any) -> Any:
        if len(runs) > 1:
            raise KeyboardInterrupt
        return prepare(self, *args)

    def sampled(self: Any, *args: Any) -> Any:
        found = taken(self, *args)
        if runs_before == 0 and len(self.samples) >= 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(timing.Trial, "prepare", prepared)
    monkeypatch.setattr(timing.Trial, "take_sample", sampled)
    data = tmp_path / "data.json"
    assert call("bench", folder, *SMALL, "--json", data) == 130
    result = json.loads(data.read_text(encoding="utf-8"))
    assert result["interrupted"] and len(runs) == runs_before + 1
    (measurement,) = result["measurements"]
    assert any(row["wall_ms"] for row in measurement["rows"])


def test_a_model_or_a_comparison_must_be_named() -> None:
    with pytest.raises(SystemExit, match="name a MODEL to measure, or --compare OLD NEW"):
        call("bench")


def test_json_on_stdout_is_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", folder, *SMALL, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    shapes = [(each["workload"]["batch"], each["workload"]["fill"]) for each in result["measurements"]]
    assert shapes == [(2, 0.47), (2, 1.0), (1, 1.0)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "it must be one of auto, cpu, cuda"),
        (("--batch", "eight"), "--batch is 'eight'; it must be an integer"),
        (("--batch", "0"), "batch is 0; it must be an integer of 1 or more"),
        (("--fill", "47"), "it must be a fraction above 0 and at most 1"),
        (("--seq", "64"), "the model takes at most 32"),
        (("--dtypes", "int4"), "it must be out of fp32, bf16, fp16"),
        (("--contenders", "magic"), "it must be out of eager, sdpa"),
        (("--budget", "soon"), "--budget is 'soon'; it must be a number"),
        (("--html", "/no/such/folder/page.html"), "does not exist"),
        (("--json", "/no/such/folder/data.json"), "does not exist"),
        (("--csv", "/no/such/folder/data.csv"), "does not exist"),
        (("--tasks", "sing"), "--tasks names 'sing'; it must be out of encode, classify"),
        (("--tasks", "decode"), "of kind 'encoder', can be asked: encode, train"),
        (("--until", "150%"), "--until is '150%'; it must be at least 0% and below 100%"),
        (("--scaling", "depth"), "--scaling names 'depth'; it must be out of length, batch, fill"),
        (("--text", "/no/such/file.txt"), "is not a file; name a text file"),
        (("--compare", "old.json", "new.json"), "reads two results and runs nothing"),
    ],
)
def test_a_wrong_value_is_one_clear_line(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        call("bench", folder, *SMALL, *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="states what happens without a GPU")
def test_cuda_without_a_gpu_is_one_clear_line(folder: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA or ROCm device is visible"):
        call("bench", folder, *SMALL, "--device", "cuda")


def test_a_wrong_answer_is_a_failing_exit_status(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastattn.bench.contenders import torch_models

    build = torch_models.fastattn

    def wrong(*arguments: Any) -> Any:
        runner = build(*arguments)
        forward = runner.forward
        runner.forward = lambda inputs: {"last_hidden_state": forward(inputs)[0] + 1}
        return runner

    monkeypatch.setattr(torch_models, "fastattn", wrong)
    assert call("bench", folder, *SMALL, "--fill", "0.5") == 1
    assert "wrong answer" in capsys.readouterr().out


def test_env_prints_lines_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("env") == 0
    assert torch.__version__ in capsys.readouterr().out
    assert call("env", "--json") == 0
    assert json.loads(capsys.readouterr().out)["packages"]["torch"] == torch.__version__
