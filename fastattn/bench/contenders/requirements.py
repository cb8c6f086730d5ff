"""What contenders ask for before they do any work: packages, a device, a kind of model."""

from __future__ import annotations

from importlib.util import find_spec

from fastattn.bench.contenders.source import Source
from fastattn.bench.timing import MissingError

__all__ = ["require_cpu", "require_packages"]


def require_packages(*packages: str, install: str = "") -> None:
    """Check that packages can be imported.

    Args:
        packages: import names.
        install: what pip is given; the first missing package's name with hyphens if left out.

    Raises:
        MissingError: one is not installed; the message has the command that installs it.
    """
    for package in packages:
        if find_spec(package) is None:
            wanted = install or package.replace("_", "-")
            raise MissingError(f"{package}: pip install {wanted}")


def require_cpu(source: Source, project: str) -> None:
    """Check that the benchmark runs on the CPU.

    Raises:
        MissingError: it does not; the message names the project that is measured on a CPU alone.
    """
    if source.device.type != "cpu":
        raise MissingError(f"{project} on {source.device.type}: it is measured on the CPU (device='cpu')")
