"""A removed head or neuron is that head or neuron gated to zero, to the last bit, wherever sums are exact.

A projection of another width may add its products in another order, which is all that may differ. So every
projection's inputs and weights are rounded to multiples of 2^-16 here: products are multiples of 2^-32 and
their sums below 2^20, which float64 holds exactly in any order.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastattn
from fastattn.compress.pruning.structure import sites

pytest.importorskip("transformers")

sys.path[:0] = [str(Path(__file__).parents[1] / "models")]

from prune_cases import gate, selection  # noqa: E402
from prune_models import batches, bert, llama  # noqa: E402

pytestmark = pytest.mark.model

_STEP = 2.0**-16


def rounded(x: torch.Tensor) -> torch.Tensor:
    return (x / _STEP).round() * _STEP


def exactly_summing(model: nn.Module) -> nn.Module:
    def round_input(layer: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        x = rounded(args[0])
        assert x.abs().max() < 2**10 and layer.weight.abs().max() < 2**4 and layer.in_features <= 2**6
        return (x,)

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(round_input)
    return model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [bert, llama], ids=["bert", "grouped llama"])
def test_removed_is_gated_to_zero_to_the_last_bit(make, attention):
    model = make().double()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            # Wide enough that every head and neuron counts.
            parameter.copy_(rounded(4 * parameter if parameter.dim() > 1 else parameter))
    heads, neurons = selection(sites(model))
    assert sum(map(len, heads.values())) and sum(map(len, neurons.values()))
    gated, untouched = copy.deepcopy(model), copy.deepcopy(model)
    gate(gated, heads, neurons)
    fastattn.prune(model, heads=heads, ffn=neurons)
    with torch.no_grad():
        for inputs in batches(model):
            found, wanted, before = (
                exactly_summing(copy.deepcopy(each))(**inputs, output_hidden_states=True).hidden_states
                for each in (model, gated, untouched)
            )
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
            assert (wanted[-1] - before[-1]).abs().max() > 1e-3
