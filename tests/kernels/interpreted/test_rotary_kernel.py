"""Rotary position embedding in the interpreter against float64."""

from __future__ import annotations

import float64_reference as reference
import pointwise_reference as pointwise
import pytest
import torch
from fastattn_kernels.rotary import rotary_forward
from hypothesis import given, settings
from hypothesis import strategies as st

INTERLEAVED = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])


def angles(*shape: int, interleaved: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as models have them: each angle twice."""
    half = torch.randn(*shape[:-1], shape[-1] // 2, generator=torch.Generator().manual_seed(3)) * 100
    both = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
    return both.cos().to(dtype), both.sin().to(dtype)


def check(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    rotated = rotary_forward(query, key, cos, sin, interleaved)
    for out, x in zip(rotated, (query, key), strict=True):
        assert out.dtype == x.dtype and out.stride() == torch.empty_like(x).stride()
        exact = pointwise.rotary(x.double(), cos.double(), sin.double(), interleaved)
        own = pointwise.rotary(x, cos.to(x.dtype), sin.to(x.dtype), interleaved)
        what = f"{tuple(x.shape)} {x.stride()}, cos {tuple(cos.shape)}, interleaved {interleaved}"
        reference.assert_as_exact_as_pytorch(out, exact, own, what)
        width = cos.shape[-1]
        assert torch.equal(out[..., width:], x[..., width:]), f"{what}: what is not rotated passes"
    return rotated


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_any_form(data: st.DataObject) -> None:
    batch, length = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 5), "length")
    heads = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 9)), "query and key heads")
    head_dim = data.draw(st.integers(1, 40) | st.sampled_from([64, 80, 128, 256]), "head_dim")
    width = 2 * data.draw(st.integers(0, head_dim // 2) | st.just(head_dim // 2), "half of R")
    dtype = data.draw(st.sampled_from([torch.float16, torch.float32]), "dtype")
    interleaved = data.draw(st.booleans(), "interleaved")
    generator = torch.Generator().manual_seed(head_dim)
    layouts = st.sampled_from([*pointwise.LAYOUTS, "as models have it"])
    tensors = []
    for count in heads:
        layout = data.draw(layouts)
        if layout == "as models have it":  # [B, S, H, D] seen as [B, H, S, D]
            x = torch.randn(batch, length, count, head_dim, generator=generator).to(dtype).transpose(1, 2)
        else:
            x = torch.randn(batch, count, length, head_dim, generator=generator).to(dtype)
        tensors.append(pointwise.arrange(x, layout))
    of_positions = data.draw(st.sampled_from([(length,), (1, length), (batch, length)]), "cos and sin")
    angle_dtype = data.draw(st.sampled_from([torch.float32, dtype]), "dtype of cos and sin")
    cos, sin = angles(*of_positions, width, interleaved=interleaved, dtype=angle_dtype)
    cos = pointwise.arrange(cos, data.draw(st.sampled_from(["contiguous", "rows apart", "every other"])))
    check(tensors[0], tensors[1], cos, sin, interleaved)


@INTERLEAVED
def test_halves_of_cos_and_sin_need_not_agree(interleaved: bool) -> None:
    # The formula takes every element's own angle, as the reference and its gradient do.
    query, key = torch.randn(2, 3, 4, 16), torch.randn(2, 1, 4, 16)
    check(query, key, torch.randn(2, 4, 12), torch.randn(2, 4, 12), interleaved)


@INTERLEAVED
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    frequencies = 10000.0 ** (-torch.arange(8) / 8)
    positions = torch.arange(6.0)[:, None] * frequencies
    table = positions.repeat_interleave(2, -1) if interleaved else torch.cat([positions, positions], -1)
    row = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(0)).expand(1, 1, 6, 16)
    query, key = rotary_forward(row, row.flip(-1), table.cos(), table.sin(), interleaved)
    scores = (query @ key.transpose(-1, -2))[0, 0]
    for distance in range(-5, 6):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8), (2, 0, 3, 8)])
def test_nothing_to_rotate(shape: tuple[int, ...]) -> None:
    x, angle = torch.ones(shape), torch.ones(shape[2], 8)
    assert rotary_forward(x, x, angle, angle, False)[0].shape == shape
