"""Progress by stage, on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

__all__ = ["Stages"]


class Stages:
    """One line that names the stage at work; nothing where standard error is no terminal.

    Attributes:
        seconds: what every stage took, by name.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._current: tuple[str, float] | None = None
        self._bar: Any = None

    def __enter__(self) -> Self:
        from tqdm import tqdm

        # disable=None: only on a terminal.
        self._bar = tqdm(bar_format="{desc} {elapsed}", leave=False, disable=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._bar.close()

    def begin(self, name: str) -> None:
        """The stage before ends, `name` begins."""
        self._end()
        self._current = (name, time.perf_counter())
        self._bar.set_description_str(f"fastattn export: {name}")

    def _end(self) -> None:
        if self._current is not None:
            name, began = self._current
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            self._current = None
