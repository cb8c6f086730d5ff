"""Writing a folder whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastattn.onnx.runtime.manifest import MANIFEST

__all__ = ["files_of", "move", "staging"]


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the output's file system, gone at the end whatever happens.

    Made before any work starts, so that a place that cannot be written is found at once: in the folder if it
    exists (it may be a mount of its own), else in the nearest folder above it that does.

    Raises:
        OSError: it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} exists and is not a folder")
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        made = Path(tempfile.mkdtemp(prefix=".fastattn-export-", dir=place))
    except OSError as error:
        raise type(error)(f"{folder} cannot be written: {error.strerror}") from error
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def files_of(folder: Path) -> tuple[str, ...]:
    """Paths of all files, relative to the folder, in order."""
    return tuple(sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()))


def move(made: Path, folder: Path, stale: tuple[str, ...] = ()) -> None:
    """Put every file of `made` in its place in `folder`; files that an earlier export wrote (`stale`) and
    this one did not are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = files_of(made)
    # The manifest last: a folder without it is not taken for an export.
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in stale:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
    for name in sorted(files, key=lambda name: name == MANIFEST):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, folder / name)
