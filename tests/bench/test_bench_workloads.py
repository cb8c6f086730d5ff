"""Batches hit their fill, look like text and fit the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastattn.bench import Workload, auto_workloads
from fastattn.bench.workloads import maximum_positions


@given(batch=st.integers(1, 64), seq=st.integers(1, 512), fill=st.floats(0.001, 1.0), seed=st.integers(0, 5))
def test_the_fill_is_hit_to_the_token_and_lengths_stay_in_bounds(
    batch: int, seq: int, fill: float, seed: int
) -> None:
    workload = Workload(batch, seq, fill, seed)
    lengths = workload.lengths()
    assert len(lengths) == batch and min(lengths) >= 1 and max(lengths) <= seq
    assert sum(lengths) == max(batch, round(fill * batch * seq))


def test_lengths_of_the_standard_batch_are_spread_and_one_is_full() -> None:
    lengths = Workload(8, 128, 0.47).lengths()
    assert sum(lengths) / (8 * 128) == pytest.approx(0.47, abs=1e-3)
    assert max(lengths) == 128 and min(lengths) < 32 and len(set(lengths)) >= 6


def test_tokens_are_right_padded_and_the_same_every_time() -> None:
    workload = Workload(8, 32, 0.5)
    state = torch.random.get_rng_state()
    batch, again = workload.tokens(100, avoid=3), workload.tokens(100, avoid=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
    assert tuple(mask.sum(1).tolist()) == workload.lengths()
    assert bool((mask[:, :-1] >= mask[:, 1:]).all())
    # Models that count positions by the padding token need it at padding alone.
    assert bool((ids[~mask] == 3).all()) and not bool((ids[mask] == 3).any())
    assert int(ids.min()) >= 0 and int(ids.max()) < 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"seq": -1}, "seq is -1"),
        ({"batch": 2.0}, "batch is 2.0"),
        ({"fill": 0.0}, "fill is 0.0"),
        ({"fill": 47}, "fill is 47"),
        ({"fill": "half"}, "fill is 'half'"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_accepted(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}; it must be"):
        Workload(**fields)  # type: ignore[arg-type]


KINDS = ("encoder", "classifier", "decoder", "encoder-decoder")


def test_auto_workloads_are_what_each_kind_of_model_is_used_for() -> None:
    told = {kind: [str(workload) for workload in auto_workloads(kind)] for kind in KINDS}
    assert told == {
        "encoder": ["batch 8 x 128, 47% fill", "batch 8 x 128, 100% fill", "batch 1 x 128, 100% fill"],
        "classifier": [
            "classify batch 8 x 128, 47% fill",
            "classify batch 8 x 128, 100% fill",
            "classify batch 1 x 128, 100% fill",
        ],
        "decoder": [
            "prefill batch 1 x 128, 100% fill",
            "decode batch 1 x 128, 100% fill, 32 new tokens",
            "decode batch 4 x 128, 60% fill, 32 new tokens",
        ],
        "encoder-decoder": [
            "batch 8 x 128, 47% fill",
            "decode batch 8 x 64, 60% fill, 32 new tokens",
            "decode batch 1 x 64, 100% fill, 32 new tokens",
        ],
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("limit", [2, 3, 33, 64, 129, 159, 160, 4096])
def test_auto_workloads_fit_the_model(kind: Any, limit: int) -> None:
    for workload in auto_workloads(kind, limit):
        assert workload.seq + (workload.new_tokens if kind == "decoder" else 0) <= limit
        assert workload.new_tokens <= min(32, limit)
        assert (workload.new_tokens > 0) == (workload.task == "decode")


def test_a_model_without_room_for_a_token_after_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 1 position: none is left"):
        auto_workloads("decoder", 1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "sing"}, "task is 'sing'; it must be one of encode, classify, prefill, decode, train"),
        ({"task": "decode"}, "new_tokens is 0 for task 'decode'"),
        ({"new_tokens": 4}, "new_tokens is 4 for task 'encode'"),
    ],
)
def test_a_task_that_does_not_fit_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Workload(**fields)


def test_positions_that_only_padding_uses_do_not_count() -> None:
    class Offset(nn.Module):
        def __init__(self, padding_idx: int | None) -> None:
            super().__init__()
            self.position_embeddings = nn.Embedding(514, 4, padding_idx=padding_idx)
            self.config = type("Config", (), {"max_position_embeddings": 514})()

    assert maximum_positions(Offset(None)) == 514
    assert maximum_positions(Offset(1)) == 512
    assert maximum_positions(nn.Linear(2, 2)) is None
