"""How alike answers of a lower precision are: wide rows by their cosines, labels all together."""

from __future__ import annotations

import pytest
import torch

from fastattn.verification.likeness import FEW_GATES, JUDGED_ROWS, gate, likeness

GENERATOR = torch.Generator().manual_seed(0)
# Sentences a classifier of two labels is more or less sure about; of the second it knows nothing.
SURE = torch.randn(JUDGED_ROWS, 1, generator=GENERATOR)
SURE[1] = 1e-3
LOGITS = SURE * torch.tensor([2.0, -2.2])
NOISE = 0.05 * torch.randn(LOGITS.shape, generator=GENERATOR)


def passes(found: torch.Tensor) -> bool:
    kept = gate("int8", LOGITS)
    assert kept == FEW_GATES["int8"]
    return bool(likeness(found, LOGITS).mean() >= kept)


def test_an_undecided_row_does_not_make_right_labels_look_wrong() -> None:
    found = LOGITS + NOISE
    assert passes(found) and passes(LOGITS)
    rows = torch.nn.functional.cosine_similarity(found, LOGITS)
    assert rows[1] < 0.9, "by its own cosine that row is wrong"


@pytest.mark.parametrize(
    "wrong",
    [LOGITS.flip(1), LOGITS.roll(1, 0), 2 * LOGITS, 0 * LOGITS, -LOGITS, LOGITS + 0.5, LOGITS * torch.nan],
    ids=["labels exchanged", "rows exchanged", "twice", "zeros", "negated", "shifted", "nan"],
)
def test_wrong_labels_fail(wrong: torch.Tensor) -> None:
    assert not passes(wrong)


def test_wide_rows_have_a_cosine_each() -> None:
    expected = torch.randn(2, 3, 64, generator=GENERATOR)
    found = expected.clone()
    found[1, 2] *= -1
    assert likeness(found, expected).tolist() == pytest.approx([1, 1, 1, 1, 1, -1])
    assert gate("fp32", expected) is None


@pytest.mark.parametrize("shape", [(5,), (4, 1), (), (2, 3, 7)])
def test_few_columns_give_one_figure_whatever_the_shape(shape: tuple[int, ...]) -> None:
    expected = torch.randn(shape, generator=GENERATOR)
    assert likeness(expected, expected).tolist() == pytest.approx([1.0])
    assert likeness(torch.zeros(shape), torch.zeros(shape)).tolist() == [1.0]
    assert likeness(3 * expected, expected).tolist() == pytest.approx([0.6])
