"""The file tuning is kept in: one for all machines that share the user's cache folder."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.tuning.machine import Machine
    from fastattn.tuning.outcome import Tuning

__all__ = ["SCHEMA", "cache_file", "clear", "load", "machines", "save", "stored"]

SCHEMA = "fastattn.tuning/1"
_FILE = "tuning.json"


def cache_file() -> Path:
    """`tuning.json` in `FASTATTN_CACHE`, else in the folder `fastattn` of the system's cache folder:
    `XDG_CACHE_HOME` or ~/.cache, ~/Library/Caches on macOS, `LOCALAPPDATA` on Windows.
    """
    folder = os.environ.get("FASTATTN_CACHE")
    if folder:
        return Path(folder).expanduser() / _FILE
    if sys.platform == "darwin":
        caches = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        caches = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        given = Path(os.environ.get("XDG_CACHE_HOME", ""))
        # A relative path there is invalid and to be ignored (XDG Base Directory Specification).
        caches = given if given.is_absolute() else Path.home() / ".cache"
    return caches / "fastattn" / _FILE


def load(machine: Machine) -> Tuning | None:
    """What was measured on `machine`; None where nothing was.

    A file that cannot be read or is not ours is ignored with a warning: a model must load without it.
    """
    from fastattn.tuning.outcome import Tuning

    entry = machines().get(machine.key)
    if entry is None:
        return None
    try:
        return Tuning.from_dict(entry)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _ignored(cache_file(), f"its entry of this machine is damaged ({error})")
    return None


def stored(device: str) -> Tuning | None:
    """`load` of the machine this is, as tensors of `device` see it; None for any but "cpu" and "cuda"."""
    if device not in ("cpu", "cuda") or not machines():
        return None
    from fastattn.tuning.machine import this_machine

    return load(this_machine(device))


def save(tuning: Tuning) -> Path:
    """Put `tuning` in the place of what the file has of its machine; written whole or not at all.

    Raises:
        OSError: the folder or the file cannot be written.
    """
    kept = machines()
    kept[tuning.machine.key] = tuning.to_dict()
    return _write(kept)


def clear(machine: Machine) -> bool:
    """Forget `machine`: whether there was anything. A file that holds nothing else is removed."""
    path = cache_file()
    kept = machines()
    found = kept.pop(machine.key, None) is not None
    if kept:
        if found:
            _write(kept)
    elif path.is_file():
        path.unlink()
        return True
    return found


def machines() -> dict[str, Any]:
    """Every entry of the file by its machine's key, unread; none where there is no file of ours."""
    try:
        path = cache_file()
    except RuntimeError:
        # A user without a home folder has no cache.
        return {}
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        return _ignored(path, f"it cannot be read ({type(error).__name__})")
    try:
        held = json.loads(text)
    except (ValueError, RecursionError):
        return _ignored(path, "it is not JSON")
    if (
        not isinstance(held, dict)
        or held.get("schema") != SCHEMA
        or not isinstance(held.get("machines"), dict)
    ):
        return _ignored(path, f"it is not of schema {SCHEMA}")
    return dict(held["machines"])


def _write(kept: dict[str, Any]) -> Path:
    from fastattn.bench.files import write_text

    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, json.dumps({"schema": SCHEMA, "machines": kept}, indent=1) + "\n")


def _ignored(path: Path, reason: str) -> dict[str, Any]:
    warnings.warn(
        f"{path} is ignored: {reason}; `fastattn tune` writes it anew", RuntimeWarning, stacklevel=2
    )
    return {}
