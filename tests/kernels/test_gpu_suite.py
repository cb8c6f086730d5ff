"""The GPU suite's own code runs here: a part of it on a reduced grid, in Triton's interpreter."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "gpu"
# One case a check function and operation, and one of each kind of cache, mask and layout.
CHOSEN = [
    "test_gpu_attention.py::test_flags[float16-everything]",
    "test_gpu_attention.py::test_flags[float32-t5-padding]",
    "test_gpu_attention.py::test_head_sizes[float32-sizes10-causal]",
    "test_gpu_attention.py::test_strides[float16-fused]",
    "test_gpu_attention.py::test_dropout_is_the_reference_s[float32-plain]",
    "test_gpu_attention.py::test_keys_past_their_length_are_never_read[float16]",
    "test_gpu_varlen.py::test_flags[float16-causal]",
    "test_gpu_decode.py::test_flags[float32-paged16-everything]",
    "test_gpu_decode.py::test_quantized_caches[float16-contiguous-plain-int8]",
    "test_gpu_norms.py::test_layer_norm[float16-rows-768]",
    "test_gpu_norms.py::test_quantized_rows[float32-64-int8-add_rms_norm]",
    "test_gpu_norms.py::test_dropout_is_the_reference_s[float16-64-add_layer_norm]",
    "test_gpu_pointwise.py::test_softmax[float32-13]",
    "test_gpu_pointwise.py::test_gated_activation[float32-silu-128]",
    "test_gpu_pointwise.py::test_rotary[float16-batched-(80, 32)-interleaved]",
]


def suite(*arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments],
        cwd=FOLDER,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{result.stdout[-6000:]}\n{result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the suite itself runs")
def test_without_a_gpu_it_is_skipped_visibly() -> None:
    out = suite(".", "-rs", TRITON_INTERPRET="0")
    skipped = re.search(r"(\d+) skipped", out)
    assert skipped and int(skipped[1]) > 400 and " passed" not in out and "needs a GPU" in out


def test_a_part_of_it_passes_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    out = suite(*CHOSEN, TRITON_INTERPRET="1", FASTATTN_BACKEND="triton")
    assert f"{len(CHOSEN)} passed" in out, out


def test_shards_are_all_of_it_once() -> None:
    """Every test is in exactly one of three shards."""
    counts = []
    for shard in ("1/1", "1/3", "2/3", "3/3"):
        out = suite("test_gpu_pointwise.py", "--collect-only", FASTATTN_GPU_SHARD=shard)
        counts.append(set(re.findall(r"^\S*test_gpu_pointwise\.py::.*$", out, re.MULTILINE)))
    everything, *parts = counts
    assert everything and set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)
