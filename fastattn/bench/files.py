"""Writing a result file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["require_writable", "write_text"]


def require_writable(path: str | Path) -> Path:
    """Check before work starts that a file can be written at `path`; return it as a Path.

    Raises:
        OSError: the folder does not exist or cannot be written, or `path` is a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")
    return path


def write_text(path: str | Path, text: str) -> Path:
    """Write `text` to `path` through a temporary file beside it, so that a failure leaves what was there.

    Raises:
        OSError: `path` cannot be written.
    """
    path = require_writable(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes a private file; a result is as readable as any other file the user writes.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
