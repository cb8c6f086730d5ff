"""The environment tells what times depend on, and nothing about whose machine it is."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.bench import capture_environment
from fastattn.bench.environment import environment_text
from fastattn.processor import cpu_flags


def test_it_names_processor_memory_and_versions() -> None:
    environment = capture_environment()
    assert environment["cpu"]["cores"] == os.cpu_count()
    assert environment["cpu"]["torch_threads"] == torch.get_num_threads()
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["packages"]["fastattn"] == fastattn.__version__
    assert environment["memory_gib"] > 0
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", environment["date_utc"])
    assert (environment["gpu"] is None) == (not torch.cuda.is_available())
    assert set(environment["cpu"]["flags"]) <= set(cpu_flags())


def test_it_has_no_host_user_or_path() -> None:
    text = json.dumps(capture_environment())
    words = set(re.findall(r"[A-Za-z0-9_.-]+", text))
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    # A path has a separator; "GNU/Linux" is the one that an operating system's name has.
    assert "/" not in text.replace("GNU/Linux", "") and "\\\\" not in text
    assert str(Path.home()) not in text and os.getcwd() not in text


def test_a_checkout_of_another_project_is_not_taken_for_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "somebody" / ".venv" / "fastattn"
    package.mkdir(parents=True)
    os.system(f"git init -q {tmp_path / 'somebody'}")
    monkeypatch.setattr(fastattn, "__file__", str(package / "__init__.py"))
    assert capture_environment()["git"] is None


def test_the_text_has_one_line_a_fact() -> None:
    environment = capture_environment()
    lines = environment_text(environment).splitlines()
    assert any(line.startswith("cpu model") for line in lines)
    assert any(line.startswith("packages torch ") and torch.__version__ in line for line in lines)
