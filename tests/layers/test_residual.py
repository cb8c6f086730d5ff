"""The residual stream across layers: what a layer computes ahead is used exactly where it is the same, and
only there.
"""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastattn.layers import Border, FusedRMSNorm, ResidualLayer, residual
from fastattn.models.links import link_layers, unlink


class Norm(FusedRMSNorm):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)
        self.variance_epsilon = 1e-6


class Layer(ResidualLayer):
    entry_norm_name = "first_norm"

    def __init__(self, size, norm=Norm):
        super().__init__()
        self.first_norm, self.second_norm = norm(size), norm(size)
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)

    def forward(self, hidden_states):
        stream = self.residual_stream(hidden_states)
        stream.add(self.first(stream.norm(self.first_norm)))
        stream.add(self.second(stream.norm(self.second_norm)))
        return stream.leave()


class Stack(nn.Module):
    def __init__(self, size=12, depth=3, norm=Norm):
        super().__init__()
        self.layers = nn.ModuleList(Layer(size, norm) for _ in range(depth))
        self.norm = norm(size)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def formula(stack, x):
    """What the stack computes, written out."""

    def norm(module, x):
        if isinstance(module, nn.LayerNorm):
            return module(x)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * module.weight

    for layer in stack.layers:
        x = x + layer.first(norm(layer.first_norm, x))
        x = x + layer.second(norm(layer.second_norm, x))
    return norm(stack.norm, x)


@pytest.fixture(autouse=True)
def as_where_kernels_run(monkeypatch):
    """Additions wait and borders are crossed, as on a GPU; the operations themselves run in PyTorch here."""
    monkeypatch.setattr(residual, "runs_in_pytorch", lambda x: False)


@pytest.fixture
def taken(monkeypatch):
    """How often a norm computed ahead was used."""
    counts = {"used": 0}
    take_norm = Border.take_norm

    def counting(self, *arguments):
        result = take_norm(self, *arguments)
        counts["used"] += result is not None
        return result

    monkeypatch.setattr(Border, "take_norm", counting)
    return counts


@pytest.fixture(params=[Norm, nn.LayerNorm], ids=["rms", "layer_norm"])
def stack(request):
    torch.manual_seed(0)
    model = Stack(norm=request.param)
    link_layers(model)
    return model


def assert_computes_the_formula(stack, x):
    torch.testing.assert_close(stack(x), formula(stack, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_border_is_crossed(stack, taken, mode):
    with mode():
        x = torch.randn(2, 5, 12)
        assert_computes_the_formula(stack, x)
        # Two borders between three layers, one to the norm after them where it is a swapped one.
        assert taken["used"] == (3 if isinstance(stack.norm, Norm) else 2)


def test_gradients_are_the_formulas(stack):
    x = torch.randn(2, 5, 12)
    found = torch.autograd.grad(stack(x).square().sum(), list(stack.parameters()))
    expected = torch.autograd.grad(formula(stack, x).square().sum(), list(stack.parameters()))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_hook_that_edits_the_output_is_obeyed(stack, mode, in_place):
    def edit(module, arguments, output):
        if in_place:
            with torch.no_grad():
                output.mul_(2)
            return None
        return output * 2

    stack.layers[0].register_forward_hook(edit)
    with mode():
        x = torch.randn(2, 5, 12)
        halves = Stack(norm=type(stack.norm))
        halves.load_state_dict(stack.state_dict())
        halves.layers[0].register_forward_hook(lambda module, arguments, output: output * 2)
        torch.testing.assert_close(stack(x), halves(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("order", [[0, 2], [2, 1, 0], [0, 1, 1, 2], [1]])
def test_layers_left_out_repeated_and_reordered(stack, order):
    stack.layers = nn.ModuleList(stack.layers[index] for index in order)
    assert_computes_the_formula(stack, torch.randn(2, 5, 12))


@torch.no_grad()
def test_a_norm_put_in_anothers_place_is_used(stack):
    replaced = copy.deepcopy(stack.layers[1].first_norm)
    replaced.weight.mul_(3)
    stack.layers[1].first_norm = replaced
    assert_computes_the_formula(stack, torch.randn(2, 5, 12))


@torch.no_grad()
def test_a_hook_on_the_next_norm_runs_once(stack):
    calls = []
    stack.layers[1].first_norm.register_forward_hook(lambda *arguments: calls.append(1))
    stack(torch.randn(2, 5, 12))
    assert len(calls) == 1


def test_copies_and_pickles_hold_no_tensor(stack):
    x = torch.randn(2, 5, 12)
    stack.layers[0](x)  # leaves something at the first border
    duplicate = copy.deepcopy(stack)
    assert duplicate.layers[1].fastattn_before._held is None
    assert duplicate.layers[0].fastattn_next[0] is duplicate.layers[1].first_norm
    assert duplicate.layers[0].fastattn_after is duplicate.layers[1].fastattn_before
    file = io.BytesIO()
    torch.save(stack, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for model in (duplicate, loaded):
        torch.testing.assert_close(model(x), stack(x))
        assert model.state_dict().keys() == stack.state_dict().keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing_by_hand(stack, reentrant):
    x = torch.randn(2, 5, 12, requires_grad=True)

    def run(x):
        for layer in stack.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return stack.norm(x)

    found = torch.autograd.grad(run(x).square().sum(), [x]) if not reentrant else None
    if reentrant:
        run(x).square().sum().backward()
        found = [x.grad]
        weights = [parameter.grad for parameter in stack.parameters()]
        expected = torch.autograd.grad(formula(stack, x).square().sum(), list(stack.parameters()))
        for got, wanted in zip(weights, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(formula(stack, x).square().sum(), [x])
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)


def test_one_graph_when_compiled(stack):
    x = torch.randn(2, 5, 12)
    compiled = torch.compile(stack, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), formula(stack, x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


@torch.no_grad()
def test_eight_threads_get_their_own_answers(stack):
    inputs = [torch.randn(2, 5, 12) for _ in range(8)]
    expected = [formula(stack, x) for x in inputs]
    errors = []

    def work(x, wanted):
        with torch.no_grad():
            for _ in range(50):
                errors.append((stack(x) - wanted).abs().max().item())

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 400 and max(errors) < 1e-5


@torch.no_grad()
def test_unlinked_layers_compute_for_themselves(stack, taken):
    for module in stack.modules():
        unlink(module)
    assert_computes_the_formula(stack, torch.randn(2, 5, 12))
    assert taken["used"] == 0


def test_where_pytorch_runs_nothing_waits(stack, taken, monkeypatch):
    monkeypatch.undo()
    x = torch.randn(2, 5, 12)
    assert_computes_the_formula(stack, x)
    assert isinstance(stack.layers[0].residual_stream(x), residual.PlainStream) and taken["used"] == 0
