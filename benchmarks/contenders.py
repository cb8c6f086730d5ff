"""What the suites put in a table: the rows of each group, and the peers that are only on some machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from gpu_sections.attention import BACKENDS, block_mask, flex, sdpa
from gpu_sections.timing import liger
from torch import Tensor
from torch.nn.attention import SDPBackend

from fastattn.bench import MissingError, Workload

__all__ = [
    "BATCH",
    "EAGER",
    "FASTATTN",
    "FLEX",
    "HEADS",
    "LIGER",
    "PYTORCH",
    "REFERENCE",
    "SDPA_BACKENDS",
    "Make",
    "Randn",
    "Run",
    "contenders",
    "flex_attention",
    "liger",
    "precision",
    "sdpa_backends",
]

Run = Callable[[], Any]
# Makes what is timed; raises MissingError where what it needs is not here.
Make = Callable[[], Run]
# Random numbers of a shape, on the device and in the precision of the test.
Randn = Callable[..., Tensor]

# The shapes of operations: BERT-base's heads, in a batch with padding.
BATCH, HEADS = Workload(batch=8, seq=128, fill=0.47), 12

# The row others are compared with: the PyTorch function a user would call.
PYTORCH = "PyTorch"
# The formula written out, a call an operation.
EAGER = "eager"
# The formula every face of the operation is tested against: exact, not fast.
REFERENCE = "reference"
FASTATTN = "fastattn"
FLEX, LIGER = "FlexAttention", "Liger"
SDPA_BACKENDS = {"SDPA math": SDPBackend.MATH, **BACKENDS}


def contenders(*names: str) -> pytest.MarkDecorator:
    """The rows of a test's group, the first of them what the others are compared with."""
    return pytest.mark.parametrize("contender", names)


def sdpa_backends(tensors: Sequence[Tensor], **named: Any) -> dict[str, Make]:
    """A row a backend of SDPA; one that does not take these tensors here says so when it is called."""
    return {
        name: lambda backend=backend: partial(sdpa, backend, list(tensors), **named)  # type: ignore[misc]
        for name, backend in SDPA_BACKENDS.items()
    }


def flex_attention(tensors: Sequence[Tensor], keep: Callable[..., Tensor], **options: Any) -> Make:
    """FlexAttention, compiled, over the pairs that `keep(b, h, q, k)` keeps; `options` are `block_mask`'s."""

    def make() -> Run:
        if tensors[0].device.type == "cpu":
            raise MissingError(
                "FlexAttention is compared on a GPU: compiled for a CPU it needs a C++ compiler"
            )
        return flex(list(tensors), block_mask=block_mask(keep, tensors[0], **options))()

    return make


def precision(device: str) -> torch.dtype:
    """What models mostly run in on that device."""
    return torch.float32 if device == "cpu" else torch.bfloat16
