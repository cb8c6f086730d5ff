"""Runs the files of interpreted/ in Triton's interpreter, one process a file, whatever this one imported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(FOLDER.glob("test_*.py"))

pytest.importorskip("triton")


def test_every_kernel_has_a_file() -> None:
    assert {file.stem for file in FILES} >= {
        "test_attention_kernel", "test_attention_drawn", "test_varlen_kernel", "test_decode_kernel",
        "test_norm_kernel", "test_softmax_kernel", "test_activation_kernel", "test_rotary_kernel",
    }  # fmt: skip


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the files are collected by this very run"
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, (
        f"{file.name} under the interpreter:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    )
    assert " passed" in result.stdout, result.stdout
    if file.stem == "test_attention_drawn":
        drawn = re.search(r"drawn attention cases: (\d+)", result.stdout)
        assert drawn and int(drawn[1]) >= 500, result.stdout[-2000:]
