"""How importance is measured: what does nothing goes first."""

from __future__ import annotations

import pytest
import torch

import fastattn
from fastattn.compress.calibration import Calibration
from fastattn.compress.pruning.importance import measure
from fastattn.compress.pruning.structure import sites

transformers = pytest.importorskip("transformers")

from prune_models import assert_untouched, batches, bert, llama, state, t5  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.once]

IMPORTANCES = ("magnitude", "taylor", "wanda")


class TestImportance:
    """What cannot matter goes first: planted useless heads, neurons and a layer, however measured."""

    @pytest.mark.parametrize("importance", IMPORTANCES)
    @pytest.mark.parametrize("make", [bert, llama, t5])
    @pytest.mark.parametrize("optimized", [False, True])
    def test_useless_heads_and_neurons_go_first(self, make, importance, optimized):
        model = make()
        if optimized:
            fastattn.optimize(model)
        structure = sites(model)
        planted = {}
        for index, site in enumerate(structure.attentions):
            useless = [1] if site.linked else [(index + 1) % site.num_heads]
            if site.group > 1:
                useless = [group * site.group + (group + index) % site.group for group in range(4)]
            self.silence(site.output, useless)
            planted[site.name] = useless
        for index, site in enumerate(structure.feed_forwards):
            planted[site.name] = [2 + index, 11, 17]
            self.silence(site.down, planted[site.name])
        gone = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                "fastattn.compress.pruning._remove",
                lambda model, structure, plan, excluded: gone.update(plan.heads | plan.neurons),
            )
            count = 4 if make is llama else 1
            fastattn.prune(model, heads=count, ffn=3, importance=importance, calibration=batches(model))
        assert gone == {name: tuple(sorted(useless)) for name, useless in planted.items()}

    @pytest.mark.parametrize("importance", IMPORTANCES)
    def test_a_useless_layer_goes_first(self, importance):
        model = bert()
        structure = sites(model)
        self.silence(structure.attentions[1].output, range(4))
        self.silence(structure.feed_forwards[1].down, range(24))
        first, _, last = model.encoder.layer
        fastattn.prune(model, layers=1, importance=importance, calibration=batches(model))
        assert list(model.encoder.layer) == [first, last]

    @staticmethod
    def silence(part, units):
        ((name, dim),) = part.tensors.items()
        with torch.no_grad():
            getattr(part.owner, name).movedim(dim, 0)[part.places[list(units)].flatten()] *= 1e-6

    def test_taylor_is_the_gates_gradient(self):
        model = bert("BertForSequenceClassification").double()
        batch = {**batches(model, 1)[0], "labels": torch.tensor([0, 1, 1])}
        structure = sites(model)
        found = measure(model, structure, "taylor", Calibration.of([batch], model))
        (site, *_) = structure.attentions
        gates = torch.ones(4, dtype=torch.float64, requires_grad=True)
        handle = site.output.owner.register_forward_pre_hook(
            lambda _, args: (args[0] * gates.repeat_interleave(8), *args[1:])
        )
        model(**batch).loss.backward()
        handle.remove()
        torch.testing.assert_close(found.heads[site.name], gates.grad.abs().float())

    def test_magnitude_is_the_norm_of_what_a_head_writes(self):
        model = llama()
        structure = sites(model)
        found = measure(model, structure, "magnitude", None)
        attention = model.model.layers[0].self_attn
        head_dim, head = 4, 5
        value = attention.v_proj.weight[head // 2 * head_dim :][:head_dim]
        output = attention.o_proj.weight[:, head * head_dim :][:, :head_dim]
        expected = (output @ value).norm()
        torch.testing.assert_close(found.heads["model.layers.0.self_attn"][head], expected.detach())

    @pytest.mark.parametrize("importance", ["taylor", "wanda"])
    def test_measuring_changes_nothing(self, importance):
        model = bert().train()
        model.embeddings.requires_grad_(False)
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        before = state(model)
        fastattn.prune(model, heads=0.2, importance=importance, calibration=batches(model))
        assert_untouched(model, before)
        assert all(module.training for module in model.modules())
        assert frozen == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_pre_hooks for module in model.modules())
