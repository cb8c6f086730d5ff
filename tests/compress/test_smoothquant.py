"""SmoothQuant: the float model's outputs and, undone, its weights stay; int8 loses less to outliers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
import transformers
from torch import nn

from fastattn.compress.calibration import Calibration
from fastattn.compress.quantization.smoothquant import smooth
from fastattn.ops import quantize_absmax

pytestmark = pytest.mark.model

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def _llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def _gpt2():
    return transformers.GPT2Model(transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4))


def _gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, num_key_value_heads=4, head_dim=8))


def _bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES))


def _with_outliers(model):
    """Norms that give a few channels a hundred times the others, as large models' do."""
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if weight is not None and weight.dim() == 1:
                weight.copy_(torch.rand_like(weight) + 0.5)
                weight[::11] *= 100.0
            elif weight is not None and weight.dim() == 2:
                # So that no layer's columns are even.
                weight.mul_(torch.logspace(-1, 1, weight.shape[1])).mul_(
                    torch.logspace(-1, 1, weight.shape[0])[:, None]
                )
    return model.eval()


def _linears(model):
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and name != "lm_head"]


def _smoothed(model, batches, alpha=0.5):
    calibration = Calibration.of(batches, model)
    names = _linears(model)
    return smooth(model, names, calibration.record_inputs(model, names), alpha, calibration)


BATCHES = [{"input_ids": torch.arange(60).view(3, 20)}, {"input_ids": torch.arange(30, 90).view(3, 20)}]
# What norms feed: (model, norms folded, layers that divide their own input).
FAMILIES = {
    # Before attention and before the MLP; not the last, which feeds the head.
    "llama": (_llama, 4, ["o_proj", "down_proj"]),
    "gpt2": (_gpt2, 4, ["attn.c_proj", "mlp.c_proj"]),
    # Its norms multiply by 1 + weight.
    "gemma": (_gemma, 0, ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    # The residual connection reads what its norms give.
    "bert": (_bert, 0, ["query", "key", "value", "output.dense", "intermediate.dense", "pooler.dense"]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_float_outputs_stay_and_undoing_gives_the_same_weights(family):
    make, folded, own = FAMILIES[family]
    model = _with_outliers(make())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(**BATCHES[0])[0]
        smoothing = _smoothed(model, BATCHES)
        actual = model(**BATCHES[0])[0]
    assert len(smoothing.folded) == folded
    assert all(any(name.endswith(end) for end in own) for name in smoothing.input_scales)
    in_norms = [name for layers in smoothing.folded.values() for name in layers]
    assert sorted([*in_norms, *smoothing.input_scales]) == sorted(_linears(model))
    # Powers of two: the same products, summed in the same order.
    assert torch.equal(actual, expected)
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, state[name])]
    assert bool(changed) == bool(folded)
    smoothing.undo()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("fold", [True, False])
def test_int8_loses_less_to_outlying_channels(fold):
    model = nn.Sequential(OrderedDict(norm=nn.LayerNorm(64), linear=nn.Linear(64, 32))).eval()
    model = _with_outliers(model)
    x = torch.randn(200, 64)
    calibration = Calibration.of(x[:100], model)
    absmax = calibration.record_inputs(model, ["linear"])

    def error(scales):
        inputs, weight = model.norm(x[100:]), model.linear.weight
        exact = inputs @ weight.T
        inputs, weight = inputs / scales, weight * scales
        row_scales = inputs.abs().amax(dim=1, keepdim=True) / 127
        rounded = (inputs / row_scales).round() * row_scales
        return float((rounded @ quantize_absmax(weight, "int8").dequantize().T - exact).norm() / exact.norm())

    with torch.no_grad():
        before = error(torch.ones(64))
        smoothing = smooth(model, ["linear"], absmax, 0.5, calibration if fold else None)
        assert list(smoothing.folded) == (["norm"] if fold else [])
        after = error(torch.ones(64) if fold else smoothing.input_scales["linear"])
    assert after < 0.5 * before


class _Reader(nn.Module):
    """A norm whose output a linear layer reads, and somebody else."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.norm, self.linear, self.other = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        if way == "tied":
            self.other.weight = self.linear.weight

    def forward(self, x):
        normed = self.norm(x)
        out = self.linear(normed)
        if self.way == "residual":
            return out + normed
        if self.way == "in place":
            return out + normed.mul_(2)
        if self.way == "returned":
            return out, normed.view(-1)
        if self.way == "other layer":
            return out + self.other(normed)
        if self.way == "tied":
            return out + self.other(x)
        return out.view(-1, 2, 4) + normed.view(-1, 2, 4).transpose(1, 2).reshape(-1, 2, 4)


@pytest.mark.once
@pytest.mark.parametrize("way", ["residual", "in place", "returned", "other layer", "tied", "through a view"])
def test_a_norm_that_something_else_reads_is_left_alone(way):
    model = _Reader(way)
    model.norm.weight.data[0] = 50.0
    calibration = Calibration.of(torch.randn(5, 8), model)
    absmax = calibration.record_inputs(model, ["linear"])
    smoothing = smooth(model, ["linear"], absmax, 0.5, calibration)
    assert not smoothing.folded and list(smoothing.input_scales) == ["linear"]


@pytest.mark.once
@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_nn_encoder(norm_first, optimized):
    import fastattn

    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    if optimized:
        fastattn.optimize(model)
    x = torch.randn(2, 5, 16)
    calibration = Calibration.of(x, model)
    names = [f"layers.{index}.linear{place}" for index in (0, 1) for place in (1, 2)]
    with torch.no_grad():
        expected = model(x)
        smoothing = smooth(model, names, calibration.record_inputs(model, names), 0.5, calibration)
        actual = model(x)
    folded = {f"layers.{index}.norm2": (f"layers.{index}.linear1",) for index in (0, 1)}
    assert smoothing.folded == (folded if norm_first else {})
    assert torch.allclose(actual, expected, atol=1e-6)


@pytest.mark.once
def test_half_precision_folds_only_what_can_be_undone():
    model = nn.Sequential(OrderedDict(norm=nn.LayerNorm(8), linear=nn.Linear(8, 4))).half()
    with torch.no_grad():
        model.linear.weight[0, 0] = 6e-8  # float16's smallest: half of it is nothing
        model.linear.weight[1:, 0] = 1.0
    before = model.linear.weight.clone()
    absmax = {"linear": torch.tensor([1e-6, *[1.0] * 7])}
    smoothing = smooth(model, ["linear"], absmax, 0.5, Calibration.of(torch.randn(3, 8).half(), model))
    assert not smoothing.folded
    assert torch.equal(model.linear.weight, before)


@pytest.mark.once
def test_inputs_or_weights_of_zero_keep_a_scale_of_one():
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[:, 1] = 0.0
    scales = smooth(model, ["0"], {"0": torch.tensor([0.0, 3.0, 1.0, 64.0])}).input_scales["0"]
    assert scales[0] == scales[1] == 1.0
    assert scales[3] > scales[2]
    with pytest.raises(ValueError, match=r"1\.5"):
        smooth(model, ["0"], {"0": torch.ones(4)}, 1.5)
