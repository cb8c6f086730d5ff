"""What a section has found so far, written after each entry: a command cut at its limit loses nothing."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from fastattn.bench.files import write_text


class Record:
    """One section's JSON file.

    Attributes:
        content: "section", "entries", "failures" (texts) and whatever the section sets beside them.
        deadline: when the section should be done, on time.monotonic's clock.
    """

    def __init__(self, section: str, path: Path, budget_s: float) -> None:
        self.path = path
        self.deadline = time.monotonic() + budget_s
        self.content: dict[str, Any] = {"section": section, "complete": False, "entries": [], "failures": []}
        self.save()

    @property
    def seconds_left(self) -> float:
        """Until the deadline; negative past it."""
        return self.deadline - time.monotonic()

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry, and write the file."""
        self.content["entries"].append(entry)
        self.save()

    def fail(self, what: str) -> None:
        """Note what is wrong: the command's exit status will be 1."""
        self.content["failures"].append(what)
        self.save()

    def set(self, **values: Any) -> None:
        """Set values beside the entries, and write the file."""
        self.content |= values
        self.save()

    def save(self) -> None:
        """Write the file whole."""
        write_text(self.path, json.dumps(self.content, indent=1))
