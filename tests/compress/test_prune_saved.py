"""Every family, pruned: layers dropped, and a saved model that comes back with its shapes."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.compress.pruning.saved import apply_shapes
from fastattn.compress.pruning.structure import sites

transformers = pytest.importorskip("transformers")

sys.path[:0] = [str(Path(__file__).parents[1] / "models")]

from family_cases import CASES  # noqa: E402
from family_models import assert_same  # noqa: E402
from prune_cases import inputs_of, model_of, run, selection  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def case(request):
    return request.param


def test_saved_and_loaded(case, tmp_path):
    model = model_of(case)
    inputs = inputs_of(model)
    shared = model.config
    heads, neurons = selection(sites(model))
    layers = {stack.name: 1 if stack.repeats or stack.first_stays else [0] for stack in sites(model).stacks}
    fastattn.prune(model, heads=heads, ffn=neurons)
    fastattn.prune(model, layers=layers)
    assert model.config is not shared and not hasattr(shared, "fastattn_pruning")
    model.save_pretrained(tmp_path)
    loaded = fastattn.load(tmp_path)
    assert type(loaded) is type(model)
    wanted = {
        name: value
        for name, value in model.state_dict().items()
        # Marian's table of positions is computed, not saved.
        if not (case.name == "Marian" and "embed_positions" in name)
    }
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in wanted.items())
    assert loaded.state_dict().keys() == model.state_dict().keys()
    if case.name == "Marian":
        loaded.load_state_dict(model.state_dict())
    for module in loaded.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation"):
            module.config._attn_implementation = case.reference
    if hasattr(model.config, "_experts_implementation"):
        loaded.config._experts_implementation = "eager"
    found, expected = run(loaded, inputs), run(model, inputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    # On the meta device, as a loader builds it: the shapes, and nothing else.
    with torch.device("meta"):
        built = type(model)(copy.deepcopy(model.config))
    apply_shapes(built, model.config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: parameter.shape for name, parameter in built.named_parameters()} == shapes


def test_layers_are_dropped(case):
    """The layers that are left run as they ran among the others."""
    model = model_of(case)
    inputs = inputs_of(model)
    fused = copy.deepcopy(model)
    fastattn.optimize(fused)
    structure = sites(model)
    removed = {
        stack.name: 1 if stack.repeats else [1 if stack.first_stays else 0] for stack in structure.stacks
    }
    kept = [
        [
            layer
            for index, layer in enumerate(stack.layers)
            if stack.repeats or index not in removed[stack.name]
        ]
        for stack in structure.stacks
    ]
    calls = []
    for layers in kept:
        for layer in layers:
            layer.register_forward_hook(lambda module, *_: calls.append(module))
    report = fastattn.prune(model, layers=removed)
    for stack in sites(model).stacks:
        before = next(part.before for part in report.parts if part.name == stack.name)
        assert stack.depth == before - 1
        for index, layer in enumerate(stack.layers):
            numbers = [getattr(module, "layer_idx", None) for module in layer.modules()]
            assert set(numbers) <= {index, None}
    expected = run(model, inputs)
    assert len(calls) == sum(stack.depth for stack in structure.stacks) - len(structure.stacks)
    assert set(calls) == {layer for layers in kept for layer in layers}

    fastattn.prune(fused, layers=removed)
    fastattn.optimize(model)
    assert_same(run(fused, inputs), expected, inputs, "optimized before")
    assert_same(run(model, inputs), expected, inputs, "optimized after")
