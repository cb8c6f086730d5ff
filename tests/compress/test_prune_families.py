"""Every family, pruned: what is removed counts as zeros, and layers of different widths run in every
attention, fused or not, with every cache. The cases are those of tests/models/family_cases.py.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.compress.pruning.structure import sites

transformers = pytest.importorskip("transformers")

sys.path[:0] = [str(Path(__file__).parents[1] / "models")]

from family_cases import CASES  # noqa: E402
from family_models import assert_same, assert_same_tokens, build  # noqa: E402
from prune_cases import gate, inputs_of, model_of, run, selection  # noqa: E402

pytestmark = pytest.mark.model


@pytest.fixture(params=CASES, ids=lambda case: case.name.replace(" ", "-"))
def case(request):
    return request.param


def test_what_is_removed_counts_as_zero(case):
    model = model_of(case, double=True)
    inputs = inputs_of(model)
    heads, neurons = selection(sites(model))
    gated = copy.deepcopy(model)
    gate(gated, heads, neurons)
    fused = copy.deepcopy(model)
    report = fastattn.prune(model, heads=heads, ffn=neurons)
    assert report.parameters_after < report.parameters_before
    assert_same(run(model, inputs), run(gated, inputs), inputs, case.name, 1e-12)

    fastattn.optimize(gated)
    wanted = run(gated, inputs)
    for context, pruned in (("optimized after", model), ("optimized before", fused)):
        fastattn.optimize(pruned)
        if context == "optimized before":
            fastattn.prune(pruned, heads=heads, ffn=neurons)
        assert_same(run(pruned, inputs), wanted, inputs, context, 1e-12)
    fastattn.restore(fused)
    assert {type(a) for a in fused.modules()} == {type(a) for a in build(case, case.classes[1]).modules()}


def test_removing_nothing_is_nothing(case):
    model = model_of(case)
    config, before = model.config, dict(model.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    structure = sites(model)
    none = {site.name: [] for site in structure.attentions}
    report = fastattn.prune(model, heads=none, ffn=0.0, layers=0)
    assert model.config is config and not hasattr(config, "fastattn_pruning")
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, values[name]) for name, parameter in before.items())
    assert report.parameters_after == report.parameters_before
    assert {part.kept - part.before for part in report.parts} == {0}


@pytest.mark.parametrize("case", [case for case in CASES if case.generates], ids=lambda case: case.name)
def test_generates_with_caches(case):
    model = model_of(case)
    inputs = inputs_of(model, "none")
    heads, neurons = selection(sites(model))
    fastattn.prune(model, heads=heads, ffn=neurons)
    fused = copy.deepcopy(model)
    fastattn.optimize(fused)
    for cache in case.caches:
        assert_same_tokens(fused, model, inputs, cache_implementation=cache)
