"""What counts as the right answer."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from fastattn.bench import Parity, compare
from fastattn.bench.parity import precision_tolerance

MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])


def test_an_error_at_a_padded_position_does_not_count_and_one_at_a_real_position_does() -> None:
    reference = torch.full((2, 3, 4), 2.0)
    padded, real = reference.clone(), reference.clone()
    padded[0, 2] = 50.0
    real[0, 1, 3] += 0.5
    assert compare(reference, padded, mask=MASK).max_abs_error == 0.0
    figure = compare(reference, real, mask=MASK)
    assert (figure.max_abs_error, figure.scale, figure.relative_error) == (0.5, 2.0, 0.25)
    assert not figure.passed


def test_the_scale_is_that_of_real_positions() -> None:
    reference = torch.ones(2, 3, 4)
    reference[0, 2] = 1000.0
    output = reference.clone()
    output[0, 0, 0] += 0.01
    assert compare(reference, output, mask=MASK).relative_error == pytest.approx(0.01, rel=1e-4)


def test_a_pooled_output_as_wide_as_the_sequence_is_compared_whole() -> None:
    reference = {"pooler_output": torch.ones(2, 3)}
    output = {"pooler_output": torch.ones(2, 3)}
    output["pooler_output"][1, 2] = 2.0
    assert not compare(reference, output, mask=MASK).passed


def test_a_sequence_of_padding_alone_is_not_compared_in_pooled_outputs() -> None:
    reference = {"pooler_output": torch.ones(2, 5)}
    output = {"pooler_output": torch.ones(2, 5)}
    output["pooler_output"][1] = 9.0
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert compare(reference, output, mask=mask).passed


def test_the_output_that_is_worst_for_its_scale_is_reported() -> None:
    reference = {"last_hidden_state": torch.full((1, 2, 2), 100.0), "pooler_output": torch.full((1, 2), 0.01)}
    output = SimpleNamespace(
        last_hidden_state=torch.full((1, 2, 2), 100.001), pooler_output=torch.full((1, 2), 0.012)
    )
    figure = compare(reference, output)
    assert figure.output == "pooler_output" and figure.relative_error == pytest.approx(0.2, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_fail(value: float) -> None:
    output = torch.ones(2, 3)
    output[0, 0] = value
    assert not compare(torch.ones(2, 3), output).passed


def test_a_nan_in_one_output_is_not_hidden_by_a_good_one() -> None:
    reference = {"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}
    output = {**reference, "b": torch.tensor([math.nan, 1.0])}
    assert not compare(reference, output).passed


def test_a_missing_output_or_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="no 'pooler_output'"):
        compare({"pooler_output": torch.ones(2)}, {"last_hidden_state": torch.ones(2)})
    with pytest.raises(ValueError, match=r"shape \[2, 1\], the reference's is \[2, 3\]"):
        compare(torch.ones(2, 3), torch.ones(2, 1))
    with pytest.raises(ValueError, match="no floating-point tensor"):
        compare(torch.ones(2, dtype=torch.int64), torch.ones(2))


def test_an_all_zero_reference_accepts_only_zeros() -> None:
    assert compare(torch.zeros(2), torch.zeros(2)).passed
    assert not compare(torch.zeros(2), torch.full((2,), 1e-9)).passed


def test_the_precision_gate_follows_the_untouched_models_own_loss_and_is_bounded() -> None:
    assert precision_tolerance(Parity(0.01, 1.0, 1.0), 2**-8) == pytest.approx(0.02 + 2**-7)
    assert precision_tolerance(Parity(0.9, 1.0, 1.0), 2**-8) == 0.1
    assert precision_tolerance(Parity(math.nan, 1.0, 1.0), 2**-8) <= 0.1


def test_a_precision_figure_can_be_told_from_a_parity_figure() -> None:
    assert "precision" in str(Parity(0.01, 1.0, 0.02, "precision"))
    assert "precision" not in str(Parity(0.01, 1.0, 0.02))
