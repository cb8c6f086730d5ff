"""What is installed: the wheel holds the library and the device code, and the kernels/ folder shadows
nobody.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, folder: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv*", "__pycache__", "*.egg-info", "build", "dist", "shared")
    shutil.copytree(ROOT, source, ignore=ignored)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            folder,
            source,
        ],
        check=True,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_everything_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    information = f"fastattn-{wheel.name.split('-')[1]}.dist-info"
    # The .pth file is one conditional line: tests/onnx/test_optimum_cli.py.
    assert tops == {"fastattn", "fastattn_kernels", "fastattn-optimum.pth", information}
    for name in (
        "fastattn/py.typed",
        "fastattn/ops/attention.py",
        "fastattn/demo/sentences.txt",
        "fastattn/models/digests.json",
        "fastattn/optimum_hook/optimum/commands/register/register_fastattn.py",
        "fastattn_kernels/attention.py",
        "fastattn_kernels/aot_table.csv",
    ):
        assert name in names


def test_the_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "import fastattn, fastattn_kernels.attention as k; print(fastattn.__file__); print(k.__file__)"
    for line in python(code, tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines():
        assert line.startswith(str(tmp_path / "site"))


def test_this_installation_imports_the_device_code(tmp_path):
    assert "fastattn_kernels" in python("import fastattn_kernels.norm as k; print(k.__file__)", tmp_path)


def test_the_hugging_face_kernels_package_imports_from_the_checkout():
    pytest.importorskip("kernels", reason="Hugging Face's kernels package is not installed")
    origin = Path(python("import kernels; print(kernels.__file__)", ROOT))
    assert ROOT / "kernels" not in origin.parents
    python("import transformers.integrations.hub_kernels", ROOT)
