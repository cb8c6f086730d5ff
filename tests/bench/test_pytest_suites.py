"""The pytest-benchmark suites: nothing public is without a row, the rows are right, and pytest-benchmark's
own options work on them.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastattn.layers
import fastattn.ops
from fastattn.models import known_families

pytest.importorskip("pytest_benchmark")
pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
LAYERS = (
    "MultiheadAttention",
    "TransformerEncoderLayer",
    "TransformerEncoder",
    "TransformerDecoderLayer",
    "TransformerDecoder",
    "AddLayerNorm",
    "AddRMSNorm",
)


def run_suites(folder: Path, *arguments: str) -> str:
    """pytest on benchmarks/ in a process of its own, working in `folder`; its output."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        *arguments,
    ]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of all rows on the CPU."""
    folder = tmp_path_factory.mktemp("collected")
    lines = run_suites(folder, "--collect-only", str(ROOT / "benchmarks")).splitlines()
    return [line.partition("::")[2] for line in lines if "[cpu-" in line]


def rows(collected: list[str], test: str) -> set[str]:
    """What follows the device in the names of one test's rows."""
    pattern = re.compile(rf"{re.escape(test)}\[cpu-(.*)\]")
    return {found[1] for name in collected if (found := pattern.fullmatch(name))}


# What makes a quantized weight once, and several products of one input, each of which has its rows.
NO_OPERATION = {
    "PackedWeight", "pack_int4", "plain", "prepare", "quantize_absmax", "quantized_linears", "unpack_int4",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in fastattn.ops.__all__ if name not in NO_OPERATION])
def test_every_operation_has_its_rows(name: str, collected: list[str]) -> None:
    test = "test_" + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    found = {row.partition("-")[0] for row in rows(collected, test)}
    assert {"PyTorch", "reference", "fastattn"} <= found, f"benchmarks/ has no {test} with these rows"


@pytest.mark.parametrize("name", ["test_attention", "test_attention_causal"])
def test_attention_is_compared_with_every_way_pytorch_has(name: str, collected: list[str]) -> None:
    backends = {"SDPA math", "SDPA efficient", "SDPA flash", "SDPA cuDNN"}
    assert {"eager", "FlexAttention"} | backends <= rows(collected, name)


def test_every_layer_has_its_rows(collected: list[str]) -> None:
    assert set(LAYERS) <= set(fastattn.layers.__all__)
    found = rows(collected, "test_layer")
    for name in LAYERS:
        single = rows(collected, f"test_{name}")
        assert single == {"PyTorch", "fastattn"} or {f"PyTorch-{name}", f"fastattn-{name}"} <= found, name


def test_every_family_has_its_rows(collected: list[str]) -> None:
    found = rows(collected, "test_family")
    for contender in ("untouched", "fastattn"):
        families = {row.split("-", 1)[1].split(":")[0] for row in found if row.startswith(contender)}
        # torch.nn's own layers have test_layers.py.
        assert families | {"torch_nn"} == set(known_families())


def test_every_operation_answers_right(tmp_path: Path) -> None:
    """The rows of the operations, each once and not timed: what a wrong answer or a broken peer fails."""
    files = [str(ROOT / "benchmarks" / f"{name}.py") for name in ("test_ops", "test_ops_attention")]
    output = run_suites(tmp_path, "--benchmark-disable", *files)
    assert re.search(r"(\d+) passed", output)


def test_pytest_benchmarks_own_options_work(tmp_path: Path) -> None:
    """Two runs of two rows: the second compares itself with the first, and draws both."""
    pytest.importorskip("pygal")
    selection = (
        str(ROOT / "benchmarks" / "test_ops.py"),
        "-k",
        "test_rms_norm and cpu and (PyTorch or fastattn)",
    )
    storage = f"--benchmark-storage=file://{tmp_path / 'saved'}"
    run_suites(tmp_path, *selection, "--benchmark-only", storage, "--benchmark-autosave")
    output = run_suites(
        tmp_path,
        *selection,
        "--benchmark-only",
        storage,
        "--benchmark-compare",
        f"--benchmark-histogram={tmp_path / 'plot'}",
        f"--benchmark-json={tmp_path / 'rows.json'}",
    )
    assert "0001_" in output and "(NOW)" in output
    assert list(tmp_path.glob("plot*.svg"))
    found = {
        each["params"]["contender"]: each
        for each in json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))["benchmarks"]
    }
    assert set(found) == {"PyTorch", "fastattn"}
    assert found["fastattn"]["group"] == "rms_norm [cpu]"
    ratio = found["fastattn"]["extra_info"]["ratio"]
    assert ratio["low"] <= ratio["value"] <= ratio["high"] and ratio["baseline"] == "PyTorch"
    assert found["fastattn"]["extra_info"]["max_error_of_scale"] <= 1e-4
