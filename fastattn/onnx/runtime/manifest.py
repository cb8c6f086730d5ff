"""`fastattn.json`: what an exported folder says of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST", "SCHEMA", "read_manifest", "write_manifest"]

MANIFEST = "fastattn.json"
SCHEMA = 2

_NEEDED = ("architecture", "kind", "precision", "target", "graphs")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder.

    Raises:
        ValueError: it is damaged, or of another version of this package.
    """
    file = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        schema = manifest.get("schema", 1)
        if schema != SCHEMA:
            raise ValueError(f"its schema is {schema}, this version of fastattn reads {SCHEMA}")
        missing = [name for name in _NEEDED if name not in manifest]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}")
        for name, entry in manifest["graphs"].items():
            if not {"file", "inputs", "outputs"} <= set(entry):
                raise ValueError(f"its graph {name!r} lacks file, inputs or outputs")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); export the model again") from error
    return manifest


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
