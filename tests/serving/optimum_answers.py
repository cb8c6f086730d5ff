"""The exported folders under optimum and sentence-transformers, in an environment without fastattn.

    python tests/serving/optimum_answers.py FOLDER

FOLDER is what export_cases.py wrote. Prints a line a case; the status is 1 if an answer differs from the
original's.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

TOLERANCE = 1e-4


def difference(found: Any, expected: Any, mask: np.ndarray | None) -> float:
    """The largest, over the output's scale, of real positions."""
    found, expected = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert found.shape == expected.shape, f"shape {found.shape}, expected {expected.shape}"
    if mask is not None and found.shape[:2] == mask.shape:
        found, expected = found[mask], expected[mask]
    assert np.isfinite(found).all(), "not finite"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def answer(case: dict[str, Any], folder: Path) -> str:
    """What the loader's answer is like; raises AssertionError where it differs."""
    expected = case["outputs"]
    if case["loader"] == "SentenceTransformer":
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(folder), backend="onnx", device="cpu")
        found = {"embeddings": model.encode(case["inputs"]["texts"])}
        mask = None
    else:
        import optimum.onnxruntime

        model = getattr(optimum.onnxruntime, case["loader"]).from_pretrained(folder)
        inputs = {name: torch.tensor(values) for name, values in case["inputs"].items()}
        if "tokens" in expected:
            tokens = model.generate(**inputs).tolist()
            assert tokens == expected["tokens"], f"generated {tokens}, expected {expected['tokens']}"
            return f"{len(tokens)} x {len(tokens[0])} tokens the same"
        found = model(**inputs)
        mask = inputs["attention_mask"].numpy().astype(bool) if "attention_mask" in inputs else None
    # A loader passes on what it knows: pooler_output is not for feature extraction.
    names = [name for name in expected if name in found]
    assert names, f"outputs are {list(found)}, expected {list(expected)}"
    worst = max(difference(found[name], expected[name], mask) for name in names)
    assert worst <= TOLERANCE, f"differs by {worst:.1e} of the scale"
    return f"{', '.join(names)} within {worst:.1e}"


def main() -> None:
    folder = Path(sys.argv[1])
    assert importlib.util.find_spec("fastattn") is None, "fastattn is installed here: nothing would be shown"
    failed = 0
    for case in json.loads((folder / "cases.json").read_text()):
        try:
            result = answer(case, folder / case["folder"])
        except Exception as error:
            failed += 1
            result = f"FAILED: {type(error).__name__}: {error}"
        print(f"{case['loader']:32} {case['folder']:24} {result}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
