"""Runs the files of interpreted/ in Triton's interpreter, one process a file, whatever this one imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


def run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest,
) -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """The files chosen, as many at a time as there are processors: the interpreter uses one."""
    chosen = [
        item.callspec.params["file"]
        for item in request.session.items
        if getattr(item, "originalname", None) == "test_in_the_interpreter"
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {file: pool.submit(run, file) for file in chosen}


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the files are collected by this very run"
)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_in_the_interpreter(file: Path, runs: dict[Path, Future[subprocess.CompletedProcess[str]]]) -> None:
    result = runs[file].result()
    assert result.returncode == 0, (
        f"{file.name} under the interpreter:\n{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    )
    assert " passed" in result.stdout, result.stdout
    if file.stem == "test_attention_drawn":
        drawn = re.search(r"drawn attention cases: (\d+)", result.stdout)
        assert drawn and int(drawn[1]) >= 500, result.stdout[-2000:]
