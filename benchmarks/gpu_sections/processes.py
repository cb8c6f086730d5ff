"""Running a command for at most so long, with everything it started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

# The exit status of what was stopped at its limit.
STOPPED = -int(signal.SIGKILL)


class Limited:
    """A command in a process group of its own, so that stopping it stops its children too."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], output: IO[str] | None
    ) -> None:
        stream = None if output is None else subprocess.STDOUT
        self._process = subprocess.Popen(
            command, cwd=folder, env=dict(environment), stdout=output, stderr=stream, start_new_session=True
        )

    def wait(self, limit_s: float) -> int:
        """The exit status, `STOPPED` where it ran past `limit_s`."""
        try:
            return self._process.wait(max(limit_s, 1.0))
        except subprocess.TimeoutExpired:
            self.stop()
            return STOPPED

    def stop(self) -> None:
        """End it and what it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
