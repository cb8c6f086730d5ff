"""`fastattn.quantize` on plain PyTorch models: what it replaces, what it leaves, what it costs, and that bad
input changes nothing.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn

import fastattn
from fastattn.compress.quantization import speed
from fastattn.layers import QuantizedLinear
from fastattn.ops.packed_weight import SCHEMES


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(speed, "_BUDGET_S", 0.0)


class Classifier(nn.Module):
    """Every place torch.nn has a linear layer in: encoder, decoder with cross-attention, a layer used twice,
    a weight shared by two layers, one tied to the embedding, and a head.
    """

    def __init__(self, batch_first=True):
        super().__init__()
        options = dict(dim_feedforward=128, dropout=0.0, batch_first=batch_first, activation="gelu")
        self.embedding = nn.Embedding(50, 64)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, **options), 2)
        self.decoder = nn.TransformerDecoderLayer(64, 4, **options)
        self.mixed = nn.MultiheadAttention(64, 4, kdim=32, vdim=96, batch_first=batch_first)
        self.twice = nn.Linear(64, 64)
        self.again = self.twice
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.second.weight = self.first.weight
        self.tied = nn.Linear(64, 50, bias=False)
        self.tied.weight = self.embedding.weight
        self.head = nn.Linear(64, 3)

    def forward(self, tokens, padding=None):
        x = self.embedding(tokens)
        memory = self.encoder(x, src_key_padding_mask=padding)
        x = self.decoder(x, memory, tgt_key_padding_mask=padding, memory_key_padding_mask=padding)
        mixed, _ = self.mixed(x, x[..., :32], torch.cat([x, x[..., :32]], -1), key_padding_mask=padding)
        x = self.again(torch.relu(self.twice(x + mixed)))
        x = self.second(torch.relu(self.first(x)))
        return self.head(x) + self.tied(x).mean(-1, keepdim=True)


@pytest.fixture
def model():
    return Classifier().eval()


@pytest.fixture
def inputs():
    tokens = torch.randint(0, 50, (3, 7))
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3, [False] * 6 + [True]])
    return tokens, padding


def real(out, inputs):
    return out[~inputs[1]]


def distance(found, expected):
    return float((found - expected).norm() / expected.norm())


def bits(model):
    return {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()}


def unchanged(model, before):
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (identity, value) in before.items():
        assert id(after[name]) == identity and torch.equal(after[name], value), name


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_torch_model_computes_nearly_the_same_before_and_after_optimize(model, inputs, scheme):
    expected = real(model(*inputs), inputs)
    limit = {"int8": 0.05, "int8-weight": 0.03, "int4-weight": 0.3, "fp8": 0.1}[scheme]
    optimized = copy.deepcopy(model)
    fastattn.optimize(optimized)
    fastattn.quantize(optimized, scheme)
    report = fastattn.quantize(model, scheme)
    found = real(model(*inputs), inputs)
    assert 0 < distance(found, expected) < limit
    assert distance(real(optimized(*inputs), inputs), found) < 0.01
    fastattn.optimize(model)
    assert distance(real(model(*inputs), inputs), found) < 0.01
    names = {layer.name for layer in report.layers if layer.status == "quantized"}
    attentions = ("encoder.layers.0.self_attn", "decoder.self_attn", "decoder.multihead_attn")
    assert names >= {f"{each}.{part}" for each in attentions for part in ("in_proj", "out_proj")}
    assert names >= {"mixed.q_proj", "mixed.k_proj", "mixed.v_proj", "encoder.layers.1.linear1", "twice"}


def test_what_stays_is_reported_with_its_reason(model):
    report = fastattn.quantize(model, "int8", exclude=("encoder.layers.0", "*.multihead_attn.out_proj"))
    reasons = {layer.name: layer.reason for layer in report.layers if layer.status == "kept"}
    assert reasons["head"] == "output head"
    assert "tied to that of a Embedding" in reasons["tied"]
    assert reasons["encoder.layers.0.linear1"] == "excluded by the caller"
    assert reasons["decoder.multihead_attn.out_proj"] == "excluded by the caller"
    assert type(model.encoder.layers[0].self_attn) is nn.MultiheadAttention
    assert model.encoder.layers[0].self_attn.in_proj_weight is not None
    assert report.to_dict()["layers"][0]["name"] == report.layers[0].name
    for layer in report.layers:
        assert layer.name in report.table()


def test_shared_layers_and_weights_stay_shared(model):
    fastattn.quantize(model, "int4-weight")
    assert model.twice is model.again
    assert model.first.weight is model.second.weight and model.second.bias is None
    assert model.tied.weight is model.embedding.weight


@pytest.mark.parametrize(
    ("scheme", "group_size", "share"),
    [("int8", 64, 0.27), ("int8-weight", 64, 0.27), ("int4-weight", 64, 0.16), ("int4-weight", 128, 0.16)],
)
def test_bytes_held(scheme, group_size, share):
    """Of the parameters and buffers themselves, biases included, and the float weights are gone."""
    model = nn.Sequential(nn.Linear(384, 1536), nn.Linear(1536, 384), nn.LayerNorm(384))
    before = sum(each.nbytes for layer in model[:2] for each in layer.parameters())
    gone = [weakref.ref(layer.weight) for layer in model[:2]]
    report = fastattn.quantize(model, scheme, group_size=group_size)
    gc.collect()
    assert not any(each() is not None for each in gone)
    held = sum(each.nbytes for layer in model[:2] for each in (*layer.parameters(), *layer.buffers()))
    assert held <= share * before
    assert report.bytes_after <= share * report.bytes_before


@pytest.mark.parametrize("optimized", [False, True])
@torch.no_grad()
def test_restore_puts_the_same_objects_back(model, inputs, optimized):
    before, classes = bits(model), [type(each) for each in model.modules()]
    expected = model(*inputs)
    if optimized:
        fastattn.optimize(model)
    fastattn.quantize(model, "int8", keep_original=True)
    assert any(isinstance(each, QuantizedLinear) for each in model.modules())
    duplicate = copy.deepcopy(model)
    fastattn.restore(duplicate)
    assert list(duplicate.state_dict()) == list(before) and torch.equal(duplicate(*inputs), expected)
    fastattn.restore(model)
    unchanged(model, before)
    assert [type(each) for each in model.modules()] == classes
    assert torch.equal(model(*inputs), expected)
    fastattn.quantize(model, "int8")


def test_restore_without_the_originals_names_the_way_out_and_changes_nothing(model, inputs):
    fastattn.optimize(model)
    fastattn.quantize(model, "int8")
    before, classes = bits(model), [type(each) for each in model.modules()]
    with pytest.raises(ValueError, match="keep_original=True"):
        fastattn.restore(model)
    unchanged(model, before)
    assert [type(each) for each in model.modules()] == classes


@torch.no_grad()
def test_optimized_takes_only_its_own_swaps_back(model, inputs):
    fastattn.quantize(model, "int8-weight")
    expected = model(*inputs)
    classes = [type(each) for each in model.modules()]
    with fastattn.optimized(model):
        assert [type(each) for each in model.modules()] != classes
    assert [type(each) for each in model.modules()] == classes
    assert torch.equal(model(*inputs), expected)
    # Quantized within: what the quantized weights need stays.
    other = Classifier().eval()
    with fastattn.optimized(other):
        fastattn.quantize(other, "int8-weight")
        expected = real(other(*inputs), inputs)
    torch.testing.assert_close(real(other(*inputs), inputs), expected)
    assert type(other.encoder) is nn.TransformerEncoder


@torch.no_grad()
def test_layers_with_a_large_error_stay():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.LayerNorm(64))
    model[2].weight[3, 3] = float("nan")
    report = fastattn.quantize(model, "int8", max_error=1e-3)
    assert [layer.status for layer in report.layers] == ["kept", "kept"]
    assert "above 0.1%" in report.layers[0].reason and report.layers[0].error > 1e-3
    assert "not finite" in report.layers[1].reason


BAD = {
    "scheme": (dict(scheme="int2"), ValueError, "scheme is 'int2'"),
    "group size": (dict(scheme="int4-weight", group_size=48), ValueError, "group_size is 48"),
    "method": (dict(scheme="int4-weight", method="awq"), ValueError, "method is 'awq'"),
    "hqq of int8": (dict(scheme="int8", method="hqq"), ValueError, "'int4-weight'"),
    "gptq uncalibrated": (dict(scheme="int4-weight", method="gptq"), ValueError, "needs calibration"),
    "smooth uncalibrated": (dict(scheme="int8", smooth=0.5), ValueError, "needs calibration"),
    "smooth of weights": (dict(scheme="int8-weight", smooth=0.5), ValueError, "quantize activations"),
    "alpha": (dict(scheme="int8", smooth=1.5), ValueError, r"\[0, 1\]"),
    "max_error": (dict(scheme="int8", max_error=0.0), ValueError, "max_error"),
    "kv_cache": (dict(scheme="int8", kv_cache="int4"), ValueError, "kv_cache is 'int4'"),
    "cache of no decoder": (dict(scheme="int8", kv_cache="int8"), ValueError, "cache"),
    "exclude": (dict(scheme="int8", exclude="nothing*"), ValueError, "nothing"),
    "no batches": (dict(scheme="int8", calibration=[]), ValueError, "no batches"),
    "text": (dict(scheme="int8", calibration=["text"]), TypeError, "tokenize"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_changes_nothing(model, name):
    options, error, said = BAD[name]
    before, classes = bits(model), [type(each) for each in model.modules()]
    with pytest.raises(error, match=said):
        fastattn.quantize(model, **options)
    unchanged(model, before)
    assert [type(each) for each in model.modules()] == classes


def test_models_that_cannot_be_quantized(model):
    with pytest.raises(TypeError, match="Module"):
        fastattn.quantize("bert", "int8")
    with pytest.raises(ValueError, match="no linear layer"):
        fastattn.quantize(nn.Linear(4, 4), "int8")
    with pytest.raises(TypeError, match="compiled"):
        fastattn.quantize(torch.compile(model), "int8")
    with pytest.raises(ValueError, match="meta device"):
        fastattn.quantize(copy.deepcopy(model).to("meta"), "int8")
    fastattn.quantize(model, "int8")
    with pytest.raises(ValueError, match="quantized already"):
        fastattn.quantize(model, "int4-weight")


@torch.no_grad()
def test_a_failure_midway_leaves_the_kept_originals_in_place(model, inputs, monkeypatch):
    from fastattn.compress.quantization import layers

    before, classes = bits(model), [type(each) for each in model.modules()]
    calls = []

    def fail(layer, packed, rows):
        calls.append(layer)
        if len(calls) == 4:
            raise MemoryError("on purpose")
        return 0.0

    monkeypatch.setattr(layers, "output_error", fail)
    with pytest.raises(MemoryError):
        fastattn.quantize(model, "int8", keep_original=True)
    unchanged(model, before)
    assert [type(each) for each in model.modules()] == classes


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_copies_and_state_dicts_are_bit_identical(model, inputs, scheme):
    other = copy.deepcopy(model)
    fastattn.quantize(model, scheme)
    expected = model(*inputs)
    assert torch.equal(copy.deepcopy(model)(*inputs), expected)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(*inputs), expected)
    for parameter in other.parameters():
        parameter.normal_()
    fastattn.quantize(other, scheme, max_error=10.0)
    for assign in (False, True):
        other.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=assign)
        assert torch.equal(other(*inputs), expected)


def test_a_float_state_dict_or_another_scheme_is_refused(model):
    state = {name: x.clone() for name, x in model.state_dict().items()}
    fastattn.quantize(model, "fp8")
    with pytest.raises(RuntimeError, match=r"twice.weight is torch.float32.*before fastattn.quantize"):
        model.load_state_dict(state, strict=False)
    other = Classifier()
    fastattn.quantize(other, "int8")
    with pytest.raises(RuntimeError, match="quantized to 'fp8', this layer to 'int8'"):
        other.load_state_dict(model.state_dict())


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_a_change_of_dtype_is_the_biases_alone(model, inputs, scheme):
    fastattn.quantize(model, scheme)
    expected = model(*inputs)
    before = {name: x.clone() for name, x in model.named_buffers()}
    for dtype in (torch.bfloat16, torch.float16):
        cast = copy.deepcopy(model).to(dtype)
        assert cast.twice.bias.dtype == dtype
        for name, buffer in cast.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
        out = cast(*inputs)
        assert out.dtype == dtype and distance(out.float(), expected) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert model.twice(torch.randn(2, 64)).dtype == torch.bfloat16
    empty = copy.deepcopy(model).to("meta")
    assert all(each.is_meta for each in (*empty.parameters(), *empty.buffers()))


@torch.no_grad()
def test_the_prepared_layout_never_reaches_a_state_dict():
    model = nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256)).eval()
    fastattn.quantize(model, "int4-weight")
    layer = model[0]
    plain = fastattn.ops.plain(layer.packed_weight)
    assert torch.equal(model.state_dict()["0.weight"], plain.values)
    fresh = QuantizedLinear(128, 256, "int4-weight", 64)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.packed_weight.values, plain.values)
    x = torch.randn(5, 128)
    torch.testing.assert_close(fresh(x), layer(x), rtol=1e-4, atol=1e-4)
    fresh.prepare()
    assert fresh.layout == layer.layout and torch.equal(fresh(x), layer(x))
    assert layer.to("meta").layout == "plain"


def test_inputs_and_biases_have_gradients(model, inputs):
    fastattn.quantize(model, "int8")
    model.train()
    model(*inputs).sum().backward()
    assert model.embedding.weight.grad.abs().sum() > 0 and model.twice.bias.grad.abs().sum() > 0
    assert not any(each.requires_grad for each in model.buffers())


@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_compiles_to_one_graph(scheme):
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    fastattn.quantize(model, scheme)
    fastattn.optimize(model)
    x = torch.randn(2, 5, 64)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert distance(compiled(x), expected) < 0.01


def test_hooked_and_foreign_layers_stay():
    class Own(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(8, 8), Own(8, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    model[0].register_forward_hook(lambda *_: None)
    report = fastattn.quantize(model, "int8")
    assert [layer.status for layer in report.layers] == ["kept", "kept", "quantized"]
    assert "hooks" in report.layers[0].reason and "subclass" in report.layers[1].reason


@pytest.mark.parametrize(
    ("scheme", "options"), [("int8", dict(smooth=0.5)), ("int4-weight", dict(method="gptq"))]
)
@torch.no_grad()
def test_calibration_lessens_the_error_and_is_undone(model, inputs, scheme, options):
    """SmoothQuant on inputs with outliers, GPTQ on inputs that are alike: outputs with less error than
    rounding to the nearest gives; restoring gives every bit back.
    """
    model.embedding.weight[:, ::16] *= 40.0
    expected = real(model(*inputs), inputs)
    before = bits(model)
    sums = []
    for chosen in (dict(method="absmax"), options):
        report = fastattn.quantize(
            model, scheme, calibration=[inputs], keep_original=True, max_error=1.0, **chosen
        )
        assert distance(real(model(*inputs), inputs), expected) < 0.4
        sums.append(sum(layer.error for layer in report.layers if layer.status == "quantized"))
        fastattn.restore(model)
        unchanged(model, before)
    assert sums[1] < 0.85 * sums[0], sums
