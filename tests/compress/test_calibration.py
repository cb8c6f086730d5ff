"""Calibration: what counts as batches, and what is recorded of the inputs of a model's layers."""

from __future__ import annotations

import weakref

import pytest
import torch
import transformers
from torch import nn

import fastattn
from fastattn.compress import input_records
from fastattn.compress.calibration import Calibration

pytestmark = pytest.mark.model

SIZES = dict(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def _bert():
    return transformers.BertModel(transformers.BertConfig(**SIZES)).eval()


def _padded_batch():
    mask = torch.ones(3, 10, dtype=torch.long)
    mask[1, 6:] = mask[2, 3:] = 0
    return {"input_ids": torch.randint(1, 99, (3, 10)) * mask, "attention_mask": mask}


def _inputs_seen(model, name, batches):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return seen


@pytest.mark.once
@pytest.mark.parametrize(
    "given",
    [
        lambda: [{"input": torch.ones(1, 3)}, {"input": torch.zeros(2, 3)}],
        lambda: ({"input": torch.full((1, 3), float(value))} for value in (1, 0)),
        lambda: [torch.ones(1, 3), torch.zeros(1, 3)],
        lambda: [(torch.ones(1, 3),), [torch.zeros(1, 3)]],
        lambda: torch.utils.data.DataLoader([torch.ones(3), torch.zeros(3)]),
        lambda: torch.utils.data.DataLoader([{"input": torch.ones(3)}, {"input": torch.zeros(3)}]),
    ],
)
def test_batches_of_every_make_are_read_again_and_again(given):
    model = nn.Linear(3, 2)
    calibration = Calibration.of(given(), model)
    assert len(calibration) == len(list(calibration)) == len(list(calibration)) == 2
    assert calibration.record_inputs(nn.Sequential(model), ["0"])["0"].tolist() == [1.0] * 3
    assert Calibration.of(calibration, model).batches is calibration.batches


def test_a_tokenizers_output_is_one_batch(minilm):
    model, tokenizer = minilm
    calibration = Calibration.of(tokenizer(["a", "b c"], padding=True, return_tensors="pt"), model)
    assert len(calibration) == 1
    assert calibration.record_inputs(model, ["pooler.dense"])["pooler.dense"].shape == (384,)


@pytest.mark.once
@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ([], ValueError, "no batches"),
        (iter(()), ValueError, "no batches"),
        ("some text", TypeError, "str"),
        (["some text"], TypeError, "tokenize"),
        (7, TypeError, "int"),
        ([7], TypeError, "batch 0 is a int"),
        ([{"input_ids": [[1, 2]]}], TypeError, "return_tensors"),
        ([{}], TypeError, "tensors"),
        ([{"input_ids": torch.ones(4, dtype=torch.long)}], ValueError, r"\[4\].*\[batch, sequence\]"),
        ([_padded_batch(), {"pixels": torch.ones(1, 2)}], TypeError, "batch 1.*pixels.*input_ids"),
    ],
)
def test_what_is_no_batch_is_said_before_any_work(given, error, says):
    model = _bert()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(error, match=says):
        Calibration.of(given, model)


@pytest.mark.parametrize("optimized", [False, True])
def test_real_positions_alone_are_recorded(optimized):
    model, batches = _bert(), [_padded_batch(), _padded_batch()]
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"]
    expected = {
        name: torch.cat(
            [x[b["attention_mask"].bool()] for b in batches for x in _inputs_seen(model, name, [b])]
        )
        for name in names
    }
    if optimized:
        fastattn.optimize(model)
    calibration = Calibration.of(batches, model)
    for kind, of in (
        ("absmax", lambda x: x.abs().amax(0)),
        ("hessian", lambda x: x.T @ x / len(x)),
        ("rows", lambda x: x),
    ):
        records = calibration.record_inputs(model, names, kind)
        for name in names:
            assert torch.allclose(records[name], of(expected[name]), atol=1e-5), (kind, name)


def test_encoder_and_decoder_have_masks_of_their_own():
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    labels = torch.randint(1, 99, (3, 6))
    decoder_mask = torch.ones_like(labels)
    decoder_mask[0, 2:] = 0
    names = {"encoder.block.0.layer.0.SelfAttention.q": 19, "decoder.block.0.layer.0.SelfAttention.q": 18}
    names["decoder.block.0.layer.1.EncDecAttention.k"] = 19
    counts = _counts(model, {**_padded_batch(), "labels": labels}, names)
    assert counts == names
    counts = _counts(
        model, {**_padded_batch(), "labels": labels, "decoder_attention_mask": decoder_mask}, names
    )
    assert counts == {**names, "decoder.block.0.layer.0.SelfAttention.q": 14}


def _counts(model, batch, names):
    records = Calibration.of(batch, model).record_inputs(model, list(names), "rows")
    return {name: len(rows) for name, rows in records.items()}


@pytest.mark.once
@pytest.mark.parametrize("optimized", [False, True])
def test_torch_nn_attention_is_recorded_though_its_projections_are_never_called(optimized):
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.bool)
    attention = model.layers[0].self_attn
    with torch.no_grad():
        expected = model(x)
        # The heads' outputs, without the projection.
        weight, bias = attention.out_proj.weight.clone(), attention.out_proj.bias.clone()
        attention.out_proj.weight.copy_(torch.eye(16))
        attention.out_proj.bias.zero_()
        joined = attention(x, x, x)[0].reshape(-1, 16)
        attention.out_proj.weight.copy_(weight)
        attention.out_proj.bias.copy_(bias)
    if optimized:
        fastattn.optimize(model)
    classes = [type(module) for module in model.modules()]
    names = ["layers.0.self_attn", "layers.0.self_attn.out_proj", "layers.0.linear2"]
    calibration = Calibration.of({"src": x, "src_key_padding_mask": padding}, model)
    rows = calibration.record_inputs(model, names, "rows")
    assert torch.allclose(rows[names[0]], x.reshape(-1, 16))
    assert torch.allclose(rows[names[1]], joined, atol=1e-6)
    assert rows[names[2]].shape == (10, 24)
    assert [type(module) for module in model.modules()] == classes
    assert "observe" not in attention.__dict__
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-6)


@pytest.mark.once
def test_the_model_is_left_as_it_was_even_when_a_batch_fails():
    model = _bert().train()
    model.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = ["encoder.layer.0.output.dense"]
    Calibration.of(_padded_batch(), model).record_inputs(model, names, "rows")
    too_long = {"input_ids": torch.full((1, 4), 1000)}
    with pytest.raises(IndexError):
        Calibration.of(too_long, model).record_inputs(model, names, "rows")
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.once
def test_rows_are_drawn_from_all_batches_and_the_same_ones_each_time(monkeypatch):
    monkeypatch.setattr(input_records, "_ROWS", 200)
    model = nn.Sequential(nn.Linear(2, 2))
    batches = [torch.arange(start, start + 500).float()[:, None].expand(-1, 2) for start in (0, 500, 1000)]
    calibration = Calibration.of(batches, model)
    state = torch.get_rng_state()
    rows = calibration.record_inputs(model, ["0"], "rows")["0"]
    assert torch.equal(torch.get_rng_state(), state)
    assert rows.shape == (200, 2) and len(rows[:, 0].unique()) == 200
    # Each batch has a third of the chance: 67 rows, with a deviation of 6.
    counts = torch.histc(rows[:, 0], 3, 0, 1500)
    assert ((counts - 200 / 3).abs() < 25).all()
    assert torch.equal(rows, calibration.record_inputs(model, ["0"], "rows")["0"])


@pytest.mark.once
def test_groups_hold_as_many_layers_as_fit():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(5)))
    calibration = Calibration.of(torch.randn(30, 16), model)
    names = [str(index) for index in range(5)]
    whole = calibration.record_inputs(model, names, "hessian")
    groups = list(calibration.record_in_groups(model, names, "hessian", max_bytes=2 * 4 * 16 * 16))
    assert [list(group) for group in groups] == [["0", "1"], ["2", "3"], ["4"]]
    assert all(torch.equal(each, whole[name]) for group in groups for name, each in group.items())
    assert len(list(calibration.record_in_groups(model, names, "hessian", max_bytes=1))) == 5


@pytest.mark.once
def test_a_layer_replaced_between_groups_is_seen_and_freed():
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    calibration = Calibration.of(torch.randn(30, 16), model)
    replaced = weakref.ref(model[0])
    groups = calibration.record_in_groups(model, ["0", "1", "2"], "absmax", max_bytes=1)
    next(groups)
    model[0] = nn.Linear(16, 16)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(7.0)
    assert replaced() is None
    assert next(groups)["1"].tolist() == [7.0] * 16


@pytest.mark.once
def test_a_layer_no_batch_reaches_has_no_record():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    model.forward = lambda x: model["used"](x)
    calibration = Calibration.of(torch.ones(1, 2), model)
    assert list(calibration.record_inputs(model, ["used", "unused"], "hessian")) == ["used"]


@pytest.mark.once
def test_wrong_names_kinds_and_inputs():
    model = nn.Sequential(nn.Linear(2, 2))
    calibration = Calibration.of(torch.ones(1, 2), model)
    with pytest.raises(ValueError, match=r"'max'.*'absmax'"):
        calibration.record_inputs(model, ["0"], "max")
    with pytest.raises(ValueError, match="'7'"):
        calibration.record_inputs(model, ["7"])
    with pytest.raises(ValueError, match=r"'0'.*finite"):
        Calibration.of(torch.full((1, 2), torch.inf), model).record_inputs(model, ["0"])


@pytest.mark.once
def test_half_precision_is_recorded_in_float32():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16()
    x = torch.randn(300, 4).bfloat16()
    records = Calibration.of([x[:100], x[100:]], model).record_inputs(model, ["0"], "hessian")
    exact = x.double().T @ x.double() / 300
    assert records["0"].dtype == torch.float32
    assert torch.allclose(records["0"].double(), exact, rtol=1e-5, atol=1e-6)
