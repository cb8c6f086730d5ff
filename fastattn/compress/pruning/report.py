"""What `prune` did, layer by layer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.report import format_table

__all__ = ["PruneReport", "PrunedPart"]


@dataclass(frozen=True)
class PrunedPart:
    """A layer's heads or neurons, or a stack's layers: how many there were, how many are kept, and why not
    fewer.

    Attributes:
        name: in the model as it was before.
        kind: "heads", "neurons", "layers" or "weights".
        before, kept: how many.
        reason: why it was left alone; empty where something went.
    """

    name: str
    kind: str
    before: int
    kept: int
    reason: str = ""


@dataclass
class PruneReport:
    """What was removed. `parts` has an entry for every layer and stack that could lose something, `notes`
    what holds for the whole model, `speedup` the "target", "predicted" and "measured" ones where one was
    asked for.
    """

    parts: list[PrunedPart] = field(default_factory=list)
    parameters_before: int = 0
    parameters_after: int = 0
    notes: list[str] = field(default_factory=list)
    speedup: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": [asdict(part) for part in self.parts],
            "parameters_before": self.parameters_before,
            "parameters_after": self.parameters_after,
            "notes": list(self.notes),
            "speedup": self.speedup,
        }

    def table(self) -> str:
        """The layers and stacks with what they kept, the parameters, then the notes."""
        rows = [(part.name, part.kind, part.before, part.kept, part.reason) for part in self.parts]
        sections = (
            [format_table(("layer", "kind", "before", "kept", "left alone because"), rows)] if rows else []
        )
        share = self.parameters_after / self.parameters_before if self.parameters_before else 1.0
        sections.append(
            f"parameters: {self.parameters_before:,} before, {self.parameters_after:,} after ({share:.1%})"
        )
        sections.extend(f"note: {note}" for note in self.notes)
        return "\n\n".join(sections)
