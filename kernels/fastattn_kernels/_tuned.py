"""Launch choices measured on a GPU (tune.py writes them): JSON files that go before the heuristics.

A file is named for its GPU, and for each operation lists keys, what a launch choice depends on, with the
configuration that was fastest:

    {"gpu": "nvidia-h100-80gb-hbm3",
     "ops": {"attention": [{"key": {"block_d": 64, "dtype": "float16"}, "choice": {"block_m": 128}}]}}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["TUNED_FOLDER", "Trial", "gpu_of", "normalized", "read_tuned", "trying", "tuned_choice"]

TUNED_FOLDER = Path(__file__).with_name("tuned")
Key = tuple[tuple[str, str], ...]


@dataclass
class Trial:
    """What launches choose while `tune` measures, in place of any file.

    Attributes:
        op: the operation whose choice is tried; others take their heuristics.
        choice: the configuration tried; None for the heuristic's.
        name: stands for the GPU's name and differs from trial to trial, so that no cached choice is taken.
        keys: the keys `op` asked for.
    """

    op: str
    choice: dict[str, int] | None
    name: str
    keys: list[dict[str, Any]] = field(default_factory=list)


_trial: Trial | None = None


@contextmanager
def trying(trial: Trial) -> Iterator[Trial]:
    """Launches inside make the trial's choices, in all threads."""
    global _trial
    _trial = trial
    try:
        yield trial
    finally:
        _trial = None


def gpu_of(device: torch.device) -> str | None:
    """The GPU's name as tuned files are called ("nvidia-h100-80gb-hbm3"); None for what is no GPU."""
    return _name_of(device) if _trial is None else _trial.name


@cache
def _name_of(device: torch.device) -> str | None:
    return normalized(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def normalized(name: str) -> str:
    """`name` in lower case with everything but letters and digits as single hyphens."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def tuned_choice(op: str, gpu: str | None, **key: Any) -> dict[str, int] | None:
    """The measured configuration of `op` for exactly `key` on `gpu`, or None where nothing was measured.

    The folder that `FASTATTN_TUNED` names is asked first, then the files that come with the package.

    Raises:
        ValueError: a file is malformed; the message names it and what is wrong.
    """
    if _trial is not None and gpu == _trial.name:
        if op != _trial.op:
            return None
        _trial.keys.append(key)
        return None if _trial.choice is None else dict(_trial.choice)
    if gpu is None:
        return None
    own = os.environ.get("FASTATTN_TUNED")
    for folder in (own, str(TUNED_FOLDER)):
        choice = _table(folder, gpu).get((op, _key(key))) if folder else None
        if choice is not None:
            return dict(choice)
    return None


def read_tuned(path: Path) -> dict[tuple[str, Key], dict[str, int]]:
    """The file's choices by operation and key.

    Raises:
        ValueError: the file is malformed; the message names it and what is wrong.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    ops = content.get("ops") if isinstance(content, dict) else None
    if not isinstance(ops, dict):
        raise ValueError(f'{path} has no "ops", an object of lists by operation')
    found = {}
    for op, entries in ops.items():
        for entry in entries if isinstance(entries, list) else [entries]:
            parts = [entry.get(part) if isinstance(entry, dict) else None for part in ("key", "choice")]
            key, choice = parts
            if not (isinstance(key, dict) and isinstance(choice, dict) and choice):
                raise ValueError(f'{path}: an entry of {op!r} needs objects "key" and "choice": {entry!r}')
            wrong = {name: number for name, number in choice.items() if not isinstance(number, int)}
            if wrong:
                raise ValueError(f"{path}: choices of {op!r} must be whole numbers, not {wrong!r}")
            found[op, _key(key)] = choice
    return found


def _key(values: dict[str, Any]) -> Key:
    return tuple(sorted((name, str(value).removeprefix("torch.")) for name, value in values.items()))


@cache
def _table(folder: str, gpu: str) -> dict[tuple[str, Key], dict[str, int]]:
    path = Path(folder) / f"{gpu}.json"
    return read_tuned(path) if path.is_file() else {}
