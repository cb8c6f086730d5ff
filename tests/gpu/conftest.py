"""The suite that needs a GPU: every operation and flag against float64 there.

    pytest tests/gpu                              # on a GPU; inputs differ each run
    FASTATTN_GPU_SEED=123 pytest tests/gpu        # the inputs of the run that printed 123
    FASTATTN_GPU_SHARD=2/8 pytest tests/gpu       # the second eighth, beside seven others

It needs torch, triton and pytest alone. Its own code runs without a GPU, in Triton's interpreter on a reduced
grid:

    TRITON_INTERPRET=1 FASTATTN_BACKEND=triton pytest tests/gpu -k plain
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path

import pytest
import torch
from gpu_checks import INTERPRETED, SEED

FOLDER = Path(__file__).parent
# The checkout will do: nothing needs to be installed.
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parents[1] / "kernels")]


def pytest_report_header() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the interpreter or skipped"
    return f"gpu suite: {where}; FASTATTN_GPU_SEED={SEED}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    own = [item for item in items if FOLDER in Path(item.path).parents]
    for item in own:
        if not INTERPRETED:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        elif "bfloat16" in item.name:
            item.add_marker(pytest.mark.skip(reason="Triton's interpreter multiplies bfloat16 wrongly"))
    shard, _, shards = os.environ.get("FASTATTN_GPU_SHARD", "1/1").partition("/")
    left_out = [item for number, item in enumerate(own) if number % int(shards) != int(shard) - 1]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh numbers each run and each test; the header prints the seed that gives them again."""
    return torch.Generator().manual_seed(zlib.crc32(f"{SEED} {request.node.name}".encode()))
