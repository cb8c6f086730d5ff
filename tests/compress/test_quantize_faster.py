"""`quantize(faster_at=)`: layers that are not faster quantized at the caller's rows stay float."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn

import fastattn
from fastattn.cli import main
from fastattn.compress.calibration import Calibration
from fastattn.compress.kv_cache import quantized_cache_kind
from fastattn.compress.quantization import speed
from fastattn.layers import QuantizedLinear
from fastattn.ops.quantized_linear_cpu import instructions

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(speed, "_COMPARED_S", 0.0)


@pytest.fixture
def clock(monkeypatch):
    """Made-up times: quantized, what expands is 1.5 times as fast, all else 0.8; gives what was timed."""
    timed = []

    def times(groups, settings):
        shape = tuple(groups[0][0].weight.shape)
        timed.append((shape, len(groups[0]), [target.name for group in groups for target in group]))
        return [3.0] * 8, [2.0 if shape[0] > shape[1] else 3.75] * 8

    monkeypatch.setattr(speed, "_timed", times)
    return timed


def bert(kind="BertForSequenceClassification", dtype=torch.float32):
    sizes = dict(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128)
    config = transformers.BertConfig(vocab_size=97, **sizes)
    return getattr(transformers, kind)(config).eval().to(dtype)


def optimized(model):
    fastattn.optimize(model)
    return model


def gpt2():
    config = transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2, vocab_size=97, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 48, dropout=0.0, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(self.encoder(x))


# What the clock finds faster in `bert()`.
EXPANDING = {f"bert.encoder.layer.{index}.intermediate.dense" for index in (0, 1)}
TOKENS = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def quantized(model):
    return {name for name, each in model.named_modules() if isinstance(each, QuantizedLinear)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_what_is_faster_is_quantized_and_the_report_says_so(clock, dtype):
    model = bert(dtype=dtype)
    before = {name: each for name, each in model.named_parameters()}
    report = fastattn.quantize(model, "int8", faster_at=512)
    assert quantized(model) == EXPANDING
    entries = {layer.name: layer for layer in report.layers}
    slow = entries["bert.encoder.layer.1.output.dense"]
    assert slow.status == "kept" and slow.reason == "0.80x as fast at 512 rows (0.80 to 0.80)"
    assert (slow.fp32_ms, slow.quantized_ms, slow.rows) == (3.0, 3.75, 512)
    assert entries["bert.encoder.layer.0.intermediate.dense"].quantized_ms == 2.0
    assert entries["classifier"].reason == "output head"
    assert "0.80x as fast at 512 rows" in report.table() and not report.notes
    for name, each in model.named_parameters():
        assert each is before[name], name
    shapes = [shape for shape, _, _ in clock]
    assert len(set(shapes)) == len(shapes), "a shape was timed twice"


@pytest.mark.once
def test_nothing_faster_leaves_the_model_as_it_is(monkeypatch, clock):
    """torch.nn's attention included, whose projections are layers while they are timed."""
    model = Encoder().eval()
    before, classes = dict(model.named_parameters()), [type(each) for each in model.modules()]
    with monkeypatch.context() as slower:
        slower.setattr(speed, "_timed", lambda groups, settings: ([1.0] * 8, [2.0] * 8))
        report = fastattn.quantize(model, "int8", faster_at=7)
    assert report.quantized == 0 and "nothing is quantized" in report.table() and "7 rows" in report.notes[0]
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is each for name, each in before.items())
    assert [type(each) for each in model.modules()] == classes

    report = fastattn.quantize(model, "int8", exclude="*.linear2", faster_at=7)
    assert quantized(model) == {f"encoder.layers.{index}.self_attn.in_proj" for index in (0, 1)}
    assert not any("linear2" in name for _, _, names in clock for name in names), "excluded, yet timed"
    assert model(torch.randn(2, 5, 64)).isfinite().all()


def test_kept_layers_are_saved_and_loaded_as_they_were(clock, tmp_path):
    for make, kept in ((bert, "bert.encoder.layer.0.output.dense"), (gpt2, "transformer.h.0.attn.c_proj")):
        model = make()
        fastattn.quantize(model, "int8", faster_at=512)
        model.save_pretrained(tmp_path / make.__name__)
        again = fastattn.load(tmp_path / make.__name__)
        assert quantized(again) == quantized(model) and kept not in quantized(again)
        assert torch.equal(again.get_submodule(kept).weight, model.get_submodule(kept).weight)
        with torch.no_grad():
            assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


def test_projections_that_share_an_input_are_timed_together_where_they_share_it(clock):
    model = bert()
    fastattn.quantize(copy.deepcopy(model), "int8", faster_at=512)
    assert {size for _, size, _ in clock} == {1}
    clock.clear()
    fastattn.optimize(model)
    report = fastattn.quantize(model, "int8", faster_at=512)
    together = [names for _, size, names in clock if size == 3]
    attention = "bert.encoder.layer.0.attention.self"
    assert [each[:3] for each in together] == [[f"{attention}.{part}" for part in ("query", "key", "value")]]
    entries = {layer.name: layer for layer in report.layers}
    assert entries[f"{attention}.key"].reason.endswith("with query, value")
    assert entries[f"{attention}.key"].fp32_ms == 1.0
    # One excluded: the others no longer share.
    clock.clear()
    fastattn.quantize(optimized(bert()), "int8", exclude="*.self.key", faster_at=512)
    assert {size for _, size, _ in clock} == {1}


def test_what_stays_is_neither_calibrated_nor_smoothed(clock, monkeypatch):
    recorded = []

    def spied(original):
        def record(self, model, names, *rest):
            recorded.extend(names)
            return original(self, model, names, *rest)

        return record

    for method in ("record_inputs", "record_in_groups"):
        monkeypatch.setattr(Calibration, method, spied(getattr(Calibration, method)))
    batches = [{"input_ids": TOKENS}]
    for options in (dict(scheme="int4-weight", method="gptq"), dict(scheme="int8", smooth=0.5)):
        model = gpt2()
        report = fastattn.quantize(
            model, calibration=batches, faster_at=512, max_error=1.0, keep_original=True, **options
        )
        assert set(recorded) == quantized(model) and report.quantized == 4
        recorded.clear()
        fastattn.restore(model)
        assert not quantized(model)
    monkeypatch.setattr(speed, "_timed", lambda groups, settings: ([1.0] * 8, [2.0] * 8))
    model = gpt2()
    fastattn.quantize(model, "int8", calibration=batches, smooth=0.5, faster_at=512)
    assert not recorded and not quantized(model)


def test_too_large_an_error_and_a_quantized_cache_compose(clock, monkeypatch):
    model = gpt2()
    report = fastattn.quantize(model, "int8", max_error=1e-6, faster_at=512)
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert (
        "above" in reasons["transformer.h.0.mlp.c_fc"] and "as fast" in reasons["transformer.h.0.mlp.c_proj"]
    )
    assert not any("nothing is quantized" in note for note in report.notes)
    fastattn.quantize(model, "int8", kv_cache="int8", faster_at=512)
    assert quantized_cache_kind(model) == "int8"
    generated = model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 12)
    # Where nothing is faster, nothing of the model changes.
    monkeypatch.setattr(speed, "_timed", lambda groups, settings: ([1.0] * 8, [2.0] * 8))
    model = gpt2()
    report = fastattn.quantize(model, "int8", kv_cache="int8", faster_at=1, keep_original=True)
    assert quantized_cache_kind(model) is None and "kv_cache 'int8' is not used" in report.table()
    assert "at 1 row on this machine" in report.table()


@pytest.mark.once
@pytest.mark.parametrize(("true_ratio", "faster"), [(1.1, True), (1.0, False), (0.9, False)])
def test_ten_percent_decides_and_noise_keeps_float(monkeypatch, true_ratio, faster):
    """Of clocks that are off by 10% a sample, nine in ten find what is so."""
    draw = random.Random(0)

    def times(groups, settings):
        noise = [[draw.lognormvariate(0.0, 0.1) for _ in range(100)] for _ in range(2)]
        return [true_ratio * each for each in noise[0]], noise[1]

    monkeypatch.setattr(speed, "_timed", times)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    found = [fastattn.quantize(copy.deepcopy(model), "int8", faster_at=4).quantized == 1 for _ in range(50)]
    assert sum(each == faster for each in found) >= 45


MEASURED = {
    "plain": lambda: bert("BertModel"),
    "fused": lambda: optimized(bert("BertModel")),
    "fused in bfloat16": lambda: optimized(bert("BertModel", torch.bfloat16)),
    "Conv1D": gpt2,
    "torch.nn": lambda: Encoder().eval(),
}


@pytest.mark.once
@pytest.mark.parametrize("name", MEASURED)
def test_measured_here(name):
    """fp8 runs the reference on a CPU: no clock takes it for faster. Of the others every layer is timed, and
    says why it stays.
    """
    model = MEASURED[name]()
    report = fastattn.quantize(copy.deepcopy(model), "fp8", faster_at=64)
    timed = [layer for layer in report.layers if layer.reason != "output head"]
    assert report.quantized == 0 and timed
    assert all(layer.rows == 64 and layer.quantized_ms > layer.fp32_ms > 0 for layer in timed)
    for scheme, smooth in (("int8", 0.5), ("int8-weight", None), ("int4-weight", None)):
        batches = None if smooth is None else [torch.randn(2, 5, 64) if name == "torch.nn" else TOKENS]
        report = fastattn.quantize(
            copy.deepcopy(model), scheme, batches, smooth=smooth, faster_at=3, max_error=1.0
        )
        for layer in report.layers:
            assert layer.reason == "output head" or (layer.status == "kept") == ("as fast" in layer.reason)


@pytest.mark.once
@pytest.mark.skipif(not instructions().int8, reason="no fast int8 products on this processor")
def test_int8_is_faster_in_a_wide_layer(monkeypatch):
    monkeypatch.setattr(speed, "_COMPARED_S", 0.3)
    model = nn.Sequential(nn.Linear(1024, 3072), nn.LayerNorm(3072))
    assert fastattn.quantize(model, "int8", faster_at=256).quantized == 1


@pytest.mark.once
@pytest.mark.parametrize("rows", [0, -1, 1.0, True, "512"])
def test_rows_that_are_none(rows):
    model = bert()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"faster_at is .*whole number of rows"):
        fastattn.quantize(model, "int8", faster_at=rows)
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


@pytest.mark.once
def test_a_model_without_weights_cannot_be_timed():
    with pytest.raises(ValueError, match="meta device"):
        fastattn.quantize(bert().to("meta"), "int8", faster_at=64)


def test_rows_that_cannot_be_timed_change_nothing(monkeypatch):
    def fail(*_):
        raise MemoryError("on purpose")

    monkeypatch.setattr(speed, "project", fail)
    model = optimized(bert("BertModel"))
    with pytest.raises(RuntimeError, match=r"faster_at: .*64 rows.*on purpose"):
        fastattn.quantize(model, "int8", faster_at=64)
    assert not quantized(model)
    with pytest.raises(RuntimeError, match="faster_at: an input of 10000000000000 rows"):
        fastattn.quantize(model, "int8", faster_at=10**13)
    assert not quantized(model)


@pytest.mark.once
def test_a_sweep_takes_it(clock, tmp_path, monkeypatch):
    from fastattn.compress import sweep_run

    monkeypatch.setattr(sweep_run, "_TIMING_S", 0.02)
    point = {"quantize": {"scheme": "int8", "faster_at": 800}}
    result = fastattn.compress.sweep(
        bert(), lambda student: float(len(quantized(student))), [point], folder=tmp_path
    )
    found = {each.name: each for each in result.points}
    assert found["int8 faster_at 800"].status != "failed", found["int8 faster_at 800"].reason
    assert found["int8 faster_at 800"].score == 2.0


@pytest.mark.once
def test_the_command_line_times_fused_layers_and_writes_plain_ones(clock, tmp_path, capsys):
    bert().save_pretrained(tmp_path / "model")
    arguments = ["quantize", str(tmp_path / "model"), "int8", "--faster-at", "800", "--output"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "0.80x as fast at 800 rows (0.80 to 0.80), with query, value" in said
    assert quantized(fastattn.load(tmp_path / "out")) == EXPANDING
    arguments[4] = "0"
    assert main([*arguments, str(tmp_path / "none")]) != 0 and "faster_at is 0" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
