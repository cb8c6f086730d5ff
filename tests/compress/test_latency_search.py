"""Sizes searched for a speed-up: the clock is a fake that counts multiplications, or a real one, briefly."""

from __future__ import annotations

import copy
import itertools
import json
import random

import pytest
import torch
from torch import nn

from fastattn.compress.calibration import Calibration
from fastattn.compress.pruning.importance import Importance, measure
from fastattn.compress.pruning.latency import _least_loss, _Option, check_target, search, workload_of
from fastattn.compress.pruning.latency_table import LatencyTable, latency_table, measured_ms, stored_in
from fastattn.compress.pruning.structure import sites

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.model


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))


class Clock:
    """A model takes as long as its linear layers have weights, and `fixed_ms` more."""

    def __init__(self, fixed_ms: float = 0.0, quantum: float = 0.0) -> None:
        self.fixed_ms, self.quantum, self.calls = fixed_ms, quantum, 0

    def __call__(self, models, batch, budget_s):
        self.calls += 1
        return [[self.ms(model)] * 7 for model in models]

    def ms(self, model: nn.Module) -> float:
        weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
        # A machine that saves less than the sum of its parts: the last of the time cannot be cut in half.
        return self.fixed_ms + weights / 1000 + self.quantum * (weights / 1000) ** 0.5


def bert(**options):
    torch.manual_seed(0)
    settings = dict(
        vocab_size=60, hidden_size=64, num_hidden_layers=3, num_attention_heads=8, intermediate_size=256
    )
    return transformers.BertModel(transformers.BertConfig(**{**settings, **options})).eval()


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        intermediate_size=128,
    )).eval()  # fmt: skip


def t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=4, d_ff=12, num_layers=2, num_heads=4, decoder_start_token_id=0,
    )).eval()  # fmt: skip


def found(model, target, clock, **options):
    structure = sites(model)
    importance = options.pop("importance", None) or measure(model, structure, "magnitude", None)
    batch = options.pop("batch", None) or workload_of(model, None)
    return search(model, structure, target, importance, batch=batch, timing=clock, **options)


@pytest.mark.parametrize("build", [bert, llama, t5], ids=["bert", "grouped-queries", "shared-bias"])
@pytest.mark.parametrize("target", [1.2, 1.7])
def test_the_speed_up_is_reached_and_the_prediction_holds(build, target):
    model, clock = build(), Clock(fixed_ms=0.5)
    before = copy.deepcopy(model.state_dict())
    result = found(model, target, clock)
    assert target <= result.measured <= 1.06 * target
    # The fake clock's times add up, but for a key head that goes with the last of its query heads.
    assert result.predicted == pytest.approx(result.measured, rel=0.05)
    assert f"{target:.2f}x asked for" in result.notes[0]
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_linked_layers_lose_the_same_heads():
    result = found(t5(), 1.7, Clock())
    by_stack = {}
    for name, removed in result.plan.heads.items():
        if "EncDec" not in name:
            by_stack.setdefault(name.split(".")[0], set()).add(removed)
    assert by_stack and all(len(choices) == 1 for choices in by_stack.values())


def test_what_matters_stays():
    """Of equal cost, the layer goes whose heads and neurons do little, and in it those that do least."""
    model = bert()
    structure = sites(model)
    heads = {site.name: torch.ones(8) for site in structure.attentions}
    neurons = {site.name: torch.ones(256) for site in structure.feed_forwards}
    first = structure.feed_forwards[0].name
    neurons[first] = torch.cat([torch.full((128,), 1e-3), torch.ones(128)])
    result = found(model, 1.1, Clock(), importance=Importance(heads, neurons))
    assert set(result.plan.neurons) == {first} and not result.plan.heads
    assert max(result.plan.neurons[first]) < 128


def test_no_block_is_emptied_where_all_are_alike():
    model = bert()
    structure = sites(model)
    importance = Importance(
        {site.name: torch.ones(8) for site in structure.attentions},
        {site.name: torch.ones(256) for site in structure.feed_forwards},
    )
    result = found(model, 2.0, Clock(), importance=importance)
    widths = [256 - len(result.plan.neurons.get(site.name, ())) for site in structure.feed_forwards]
    assert max(widths) - min(widths) <= 256 / 8


def test_the_search_is_exact():
    """Against all combinations, on random tables; a block's option may save nothing, or cost time."""
    for seed in range(30):
        draw = random.Random(seed)
        options = [
            [_Option((), 0.0, 0.0)]
            + [_Option((i,), draw.uniform(-1, 4), draw.uniform(0, 5)) for i in range(draw.randint(1, 4))]
            for _ in range(4)
        ]
        needed = draw.uniform(0.5, 8)
        feasible = [
            sum(option.loss for option in each)
            for each in itertools.product(*options)
            if sum(option.saved_ms for option in each) >= needed
        ]
        chosen = _least_loss(options, needed)
        if chosen is None:
            assert not feasible, seed
            continue
        assert sum(option.saved_ms for option in chosen) >= needed
        assert sum(option.loss for option in chosen) == pytest.approx(min(feasible)), seed


def test_time_that_cannot_be_cut_counts_and_too_much_is_refused():
    model = bert()
    clock = Clock()
    clock.fixed_ms = clock.ms(model)
    with pytest.raises(ValueError, match=r"target_speedup is 2.5; .* the model is 1\.\d\d times as fast"):
        found(model, 2.5, clock)


def test_a_plan_that_falls_short_is_corrected():
    """The clock saves less than the sum of what its parts do: the first plan misses, a later one does not."""
    result = found(bert(), 1.8, Clock(quantum=8.0))
    assert 1.8 <= result.measured <= 1.9
    assert abs(result.predicted - result.measured) > 0.02


@pytest.mark.once
def test_the_table_is_kept_by_machine_model_and_workload():
    model, clock = bert(), Clock()
    structure, batch = sites(model), {"input_ids": torch.ones(2, 9, dtype=torch.long)}
    table = latency_table(model, structure, batch, clock, 1.0)
    measured = clock.calls
    assert latency_table(bert(), structure, batch, clock, 1.0) == table and clock.calls == measured
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert "input_ids [2 x 9]; float32" in table.workload and "threads" in table.machine
    longer = {"input_ids": torch.ones(2, 10, dtype=torch.long)}
    for other, given in ((model, longer), (bert(num_hidden_layers=2), batch), (model.double(), batch)):
        calls = clock.calls
        latency_table(other, sites(other), given, clock, 1.0)
        assert clock.calls > calls
    assert len(json.loads(stored_in().read_text())["tables"]) == 4
    stored_in().write_text("{ not json")
    calls = clock.calls
    latency_table(model, structure, batch, clock, 1.0)
    assert clock.calls > calls


@pytest.mark.once
def test_a_table_holds_every_size_and_what_a_block_saves():
    model, clock = bert(), Clock(fixed_ms=1.0)
    table = latency_table(model, sites(model), workload_of(model, None), clock, 1.0)
    attention, feed_forward = table.sizes
    assert list(table.sizes[attention]) == [1, 2, 3, 4, 5, 6, 7]
    assert table.blocks == {attention: 3, feed_forward: 3}
    assert table.full_ms == clock.ms(model)
    assert table.saved_ms(attention, 4) == pytest.approx(4 * (64 * 32) / 1000)
    for size, ms in table.sizes[feed_forward].items():
        assert table.full_ms - ms == pytest.approx(3 * 2 * 64 * (256 - size) / 1000)


@pytest.mark.once
def test_a_size_that_was_lucky_gains_nothing():
    """Half the heads, measured as faster than a quarter of them: both count as the mean of the two."""

    class Lucky(Clock):
        def ms(self, model):
            heads = {site.num_heads for site in sites(model).attentions}
            return {2: 70.0, 4: 60.0}.get(max(heads), 90.0) if len(heads) == 1 else 90.0

    model = bert()
    table = latency_table(model, sites(model), workload_of(model, None), Lucky(), 1.0)
    times = next(iter(table.sizes.values()))
    assert times[2] == times[4] and list(times.values()) == sorted(times.values())
    assert times[1] <= times[2] <= times[5]


@pytest.mark.once
@pytest.mark.parametrize("target", [1.0, 0.5, float("inf"), float("nan"), "2x", True])
def test_a_target_that_is_none(target):
    with pytest.raises(ValueError, match="a number above 1"):
        check_target(target)


@pytest.mark.once
def test_a_model_of_no_text_needs_calibration():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    with pytest.raises(ValueError, match="needs calibration for a TransformerEncoder"):
        workload_of(model, None)
    batch = workload_of(model, Calibration.of([torch.randn(2, 3, 16)], model))
    result = found(model, 1.3, Clock(), batch=batch)
    assert result.measured >= 1.3


def test_on_a_real_clock_a_much_smaller_model_is_faster():
    model = bert(hidden_size=128, num_attention_heads=2, num_hidden_layers=2, intermediate_size=768)
    batch = {"input_ids": torch.ones(8, 64, dtype=torch.long)}
    result = found(model, 1.5, measured_ms, batch=batch, budget_s=1.0)
    assert result.ratio is not None and result.ratio.value == pytest.approx(result.measured)
    assert result.table.full_ms > 0 and result.measured > 1.15
    assert result.plan.heads or result.plan.neurons
