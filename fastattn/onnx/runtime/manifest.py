"""`fastattn.json`: what an exported folder says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "SCHEMA", "read_manifest", "write_manifest"]

MANIFEST = "fastattn.json"
SCHEMA = 2

_NEEDED = ("architecture", "kind", "precision", "target", "graphs")
_NEEDED_OF_A_GRAPH = ("file", "inputs", "outputs")
_NEEDED_OF_AN_INPUT = ("name", "dtype", "dimensions", "default", "limit", "bounds")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        ValueError: it is missing, damaged, or of another version of this package.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} has no {MANIFEST}; fastattn.export writes it")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict):
            raise ValueError(f"it holds a {type(manifest).__name__}, not an object")
        schema = manifest.get("schema")
        if isinstance(schema, int) and schema != SCHEMA:
            raise ValueError(
                f"{file} is of schema {schema}, this version of fastattn reads {SCHEMA}; "
                f"{'update fastattn' if schema > SCHEMA else 'export the model again'}"
            )
        _check_keys(manifest, ("schema", *_NEEDED), "it")
        if not manifest["graphs"]:
            raise ValueError("it has no graph")
        for name, graph in manifest["graphs"].items():
            _check_keys(graph, _NEEDED_OF_A_GRAPH, f"its graph {name!r}")
            for entry in graph["inputs"]:
                _check_keys(entry, _NEEDED_OF_AN_INPUT, f"an input of its graph {name!r}")
    except (ValueError, AttributeError, TypeError) as error:
        if str(error).startswith(str(file)):
            raise
        raise ValueError(f"{file} is damaged ({error}); export the model again") from error
    return manifest


def _check_keys(entry: dict[str, Any], needed: tuple[str, ...], what: str) -> None:
    missing = [name for name in needed if name not in entry]
    if missing:
        raise ValueError(f"{what} has no {missing[0]!r}")


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
