"""`ops.softmax` against PyTorch's own and float64."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

from fastattn import ops

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
FORMS = pytest.mark.parametrize(
    ("scale", "masked", "causal"),
    [(1.0, False, False), (0.125, False, False), (1.0, True, False), (-0.5, True, True), (1.0, False, True)],
)


def own(x, mask, scale, causal):
    """PyTorch's softmax of what is kept, in x's dtype; a row that keeps nothing is zeros."""
    keep = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.broadcast_to(x.shape)
    if causal:
        keep = keep.tril(x.shape[-1] - x.shape[-2])
    weights = torch.softmax((x * scale).masked_fill(~keep, float("-inf")), -1)
    return torch.where(keep.any(-1, keepdim=True), weights, 0.0)


@DTYPES
@FORMS
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (4, 4), (3, 1), (1, 3, 9, 4), (0, 3, 4), (2, 2, 20000)])
def test_softmax(shape, scale, masked, causal, dtype):
    x = (torch.randn(shape) * 4).to(dtype)
    mask = torch.rand(shape[-1]) > 0.4 if masked else None
    before = x.clone()
    found = ops.softmax(x, mask, scale, causal)
    assert found.dtype == dtype
    exact = own(x.double(), mask, scale, causal)
    assert_close(found, own(x, mask, scale, causal), exact, (scale, masked, causal))
    assert (found[exact == 0] == 0).all()
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(7,), (1, 7), (5, 1), (5, 7), (3, 1, 7), (2, 1, 1, 7), (2, 3, 5, 7)])
def test_masks_broadcast(shape):
    x, mask = torch.randn(2, 3, 5, 7), torch.rand(shape) > 0.4
    torch.testing.assert_close(ops.softmax(x, mask), own(x, mask, 1.0, False))


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_with_nothing_left_are_zeros(scale, dtype):
    x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1] = False
    with torch.no_grad():
        x[2] = float("-inf")
        found = ops.softmax(x, mask, scale)
    assert (found[1:3] == 0).all() and (found[[0, 3]].sum(-1) - 1).abs().max() < 1e-2
    # Recorded, and differentiated, alike.
    recorded = ops.softmax(x, mask, scale)
    torch.testing.assert_close(recorded.detach(), found)
    (gradient,) = torch.autograd.grad(recorded[:, 0].sum(), x)
    assert gradient.isfinite().all() and (gradient[1:3] == 0).all()


def test_what_is_hidden_is_not_read_and_nan_stays_in_its_row():
    x, mask = torch.randn(3, 8), torch.arange(8) % 2 == 0
    expected = ops.softmax(x, mask)
    x[:, 1::2] = float("nan")
    assert torch.equal(ops.softmax(x, mask), expected)
    x[1, 0] = float("nan")
    found = ops.softmax(x, mask)
    assert found[1, ::2].isnan().all() and torch.equal(found[::2], expected[::2])


def test_causal_is_aligned_at_the_last_row_and_column():
    found = ops.softmax(torch.zeros(2, 4), causal=True)
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0], [0.25, 0.25, 0.25, 0.25]]))


@FORMS
def test_gradients(scale, masked, causal):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([True, True, False, True, False]) if masked else None
    assert torch.autograd.gradcheck(lambda x: ops.softmax(x, mask, scale, causal), x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.softmax(torch.ones(2).int()), TypeError, "x is torch.int32"),
        (lambda: ops.softmax(torch.ones(())), ValueError, r"x must be \[..., N\]; got \[\]"),
        (
            lambda: ops.softmax(torch.ones(3), causal=True),
            ValueError,
            r"\[..., M, N\] to be causal; got \[3\]",
        ),
        (
            lambda: ops.softmax(torch.ones(3), torch.ones(3)),
            TypeError,
            "mask is torch.float32; .* torch.bool",
        ),
        (
            lambda: ops.softmax(torch.ones(2, 3), torch.ones(2, 2).bool()),
            ValueError,
            r"mask must broadcast to x \[2, 3\]; got \[2, 2\]",
        ),
        (
            lambda: ops.softmax(torch.ones(3), torch.ones(2, 3).bool()),
            ValueError,
            r"broadcast to x \[3\]; got \[2, 3\]",
        ),
        (
            lambda: ops.softmax(torch.ones(3), torch.ones(3, device="meta").bool()),
            ValueError,
            "mask is on meta",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()
