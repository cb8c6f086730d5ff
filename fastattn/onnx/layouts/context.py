"""What a layout is written from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.targets import Target

__all__ = ["LayoutContext"]


@dataclass(frozen=True)
class LayoutContext:
    """Attributes:
    staging: the folder under construction: graphs, config.json and the tokenizer's files are there.
    source, target, precision, tokenizer: of the export.
    manifest: what `fastattn.json` will hold.
    """

    staging: Path
    source: Source
    target: Target
    precision: str
    tokenizer: Any
    manifest: dict[str, Any]
