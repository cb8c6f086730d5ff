"""The packages of the `onnx` extra, asked for only where they are used."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require"]


def require(*packages: str) -> None:
    """Check that packages are installed.

    Raises:
        ImportError: one is not; the message names every missing one and the command that installs them.
    """
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise ImportError(
            f'{", ".join(missing)} not installed; pip install "fastattn[onnx]"', name=missing[0]
        )
