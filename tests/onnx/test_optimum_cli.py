"""`optimum-cli export fastattn`: there where optimum is, and no trace of it where it is not; from a wheel and
from an editable install.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[2]
HOOK = "fastattn-optimum.pth"


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory) -> Path:
    """A folder with what pip would put into site-packages."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    source.mkdir()
    for name in ("fastattn", "kernels"):
        shutil.copytree(
            ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"import setuptools.build_meta as b; b.build_{request.param}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def run(site: Path, code: str, beside: Iterable[str] = ()) -> subprocess.CompletedProcess[str]:
    """Code in a new interpreter whose site-packages are the folder, and `beside`, of which no .pth file is
    read: this environment's fastattn may be installed with one of its own.
    """
    prepared = f"import site, sys\nsys.path += {list(beside)!r}\nsite.addsitedir({str(site)!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", prepared],
        capture_output=True,
        text=True,
        cwd=site,
        env=dict(os.environ),
    )


def test_without_optimum_there_is_no_package_of_its_name(installed):
    code = (
        "import importlib.util, sys\n"
        "assert importlib.util.find_spec('fastattn') is not None\n"
        "assert importlib.util.find_spec('optimum') is None\n"
        "assert not any('optimum_hook' in place for place in sys.path), sys.path"
    )
    result = run(installed, code)
    assert result.returncode == 0, result.stderr
    assert (installed / HOOK).read_text().count("\n") == 1


def optimum_cli(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import sys
sys.argv = {["optimum-cli", *arguments]!r}
from optimum.commands.optimum_cli import main
main()
"""
    return run(site, code, [place for place in sys.path if place.endswith("site-packages")])


def test_optimum_cli_knows_the_command(installed):
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
    result = optimum_cli(installed, "export", "--help")
    assert result.returncode == 0, result.stderr
    assert "{fastattn}" in result.stdout or "fastattn" in result.stdout.split()
    result = optimum_cli(installed, "export", "fastattn", "--help")
    for option in ("--model", "--precision", "--target", "--task", "--layouts", "--no-verify", "--json"):
        assert option in result.stdout


@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_optimum_cli_exports(installed, new_bert, tmp_path):
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")
    pytest.importorskip("onnxscript")
    new_bert(num_hidden_layers=1).save_pretrained(tmp_path / "saved")
    saved, out = str(tmp_path / "saved"), str(tmp_path / "out")
    result = optimum_cli(installed, "export", "fastattn", "-m", saved, out, "--no-verify", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["layouts"] == ["transformers", "optimum"]
    assert (tmp_path / "out" / "model.onnx").is_file()
    result = optimum_cli(installed, "export", "fastattn", "-m", saved, out, "--target", "toaster")
    assert result.returncode == 2
    assert "fastattn export: target is 'toaster'" in result.stderr
