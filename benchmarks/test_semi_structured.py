"""Linear layers with two zeros in every four weights, multiplied without them and whole: on GPUs alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import GPU
from contenders import PYTORCH, contenders
from torch import nn

from fastattn.compress.pruning.semi_structured import prune_2_4

SPARSE = "2:4"
# Inputs and outputs: BERT-base's feed-forward, Llama 8B's.
SHAPES = [(768, 3072), (4096, 14336)]


@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("rows", [128, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@contenders(PYTORCH, SPARSE)
def test_linear(versus: Any, device: str, shape: tuple[int, int], rows: int) -> None:
    # The second is an output head to `prune_2_4`, which leaves it alone.
    model = nn.Sequential(nn.Linear(*shape), nn.Linear(shape[1], 64)).to(device, torch.bfloat16)
    prune_2_4(model)
    layer = model[0]
    whole = copy.deepcopy(layer)
    whole.__class__ = nn.Linear
    x = torch.randn(rows, shape[0], device=device, dtype=torch.bfloat16)
    versus(
        f"{shape[0]} x {shape[1]}, {rows} rows",
        {PYTORCH: lambda: whole(x), SPARSE: lambda: layer(x)},
        tolerance=4 * torch.finfo(torch.bfloat16).eps,
    )
