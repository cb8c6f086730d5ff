"""What a layout is written from, and how."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.targets import Target

__all__ = ["Layout", "LayoutContext"]


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

    def read_json(self, name: str) -> dict[str, Any]:
        """A file of the folder; {} where there is none."""
        file = self.staging / name
        return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}

    def write_json(self, name: str, content: Any) -> None:
        file = self.staging / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def link_graph(self, graph: str, name: str) -> None:
        """The graph under another name (`onnx/model_quantized.onnx`), with the file of its weights if it has
        one beside it; they are on the disk once.
        """
        self._link(f"{graph}.onnx", name)
        if self._has_second_file(graph):
            # Under its own name, which is what the graph says.
            self._link(f"{graph}.onnx.data", str(Path(name).with_name(f"{graph}.onnx.data")))

    def link_graph_alone(self, graph: str, name: str) -> None:
        """As `link_graph`, for a reader that takes no second file.

        Raises:
            ValueError: the weights are in a file of their own.
        """
        if self._has_second_file(graph):
            raise ValueError(
                f"{graph}.onnx has more than 2 GiB of weights and keeps them in a second file, which cannot "
                f"be loaded as {name}; choose a smaller precision, or leave this layout out with layouts=()"
            )
        self._link(f"{graph}.onnx", name)

    def _has_second_file(self, graph: str) -> bool:
        file = self.staging / f"{graph}.onnx.data"
        return file.is_file() and file.stat().st_size > 0

    def _link(self, made: str, name: str) -> None:
        file = self.staging / name
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(self.staging / made, file)
        except OSError:
            # File systems without hard links, and some network mounts.
            shutil.copyfile(self.staging / made, file)


@dataclass(frozen=True)
class Layout:
    """Files for one loader.

    Attributes:
        name: what `export(layouts=)` calls it.
        refusal: why a source for a target has no such layout, as the end of a sentence; None where it has.
        write: writes it into the folder under construction.
        automatic: whether it is written under "auto" wherever it can be.
    """

    name: str
    refusal: Callable[[Source, Target], str | None]
    write: Callable[[LayoutContext], None]
    automatic: bool = False
