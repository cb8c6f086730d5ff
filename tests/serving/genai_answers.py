"""The exported decoders under onnxruntime-genai.

    python tests/serving/genai_answers.py FOLDER

FOLDER is what export_cases.py wrote. Prints a line a case; the status is 1 if a token differs from the
original's.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime_genai


def generate(folder: Path, prompts: list[list[int]], length: int) -> list[list[int]]:
    """Greedy, up to `length` tokens, prompts included; prompts of one length."""
    model = onnxruntime_genai.Model(str(folder))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, batch_size=len(prompts))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(prompts, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(i)] for i in range(len(prompts))]


def main() -> None:
    folder, failed = Path(sys.argv[1]), 0
    cases = json.loads((folder / "cases.json").read_text())
    for case in cases:
        if not (folder / case["folder"] / "genai_config.json").is_file():
            continue
        # It pads for itself: of the batch the rows that are not padded, together.
        rows = [i for i, mask in enumerate(case["inputs"]["attention_mask"]) if all(mask)]
        expected = [case["outputs"]["tokens"][i] for i in rows]
        found = generate(
            folder / case["folder"], [case["inputs"]["input_ids"][i] for i in rows], len(expected[0])
        )
        same = found == expected
        failed += not same
        text = (
            f"{len(rows)} x {len(expected[0])} tokens the same"
            if same
            else f"FAILED: {found}, not {expected}"
        )
        print(f"{'onnxruntime-genai':32} {case['folder']:24} {text}", flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
