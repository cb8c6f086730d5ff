"""`ops.varlen_attention`: every packed sequence as if it were alone."""

from __future__ import annotations

import pytest
import torch

from fastattn import ops


def packed(lengths_q, lengths_k, heads=4, kv_heads=2, head_dim=16, value_dim=16, dtype=torch.float32):
    query = torch.randn(sum(lengths_q), heads, head_dim, dtype=dtype)
    key = torch.randn(sum(lengths_k), kv_heads, head_dim, dtype=dtype)
    value = torch.randn(sum(lengths_k), kv_heads, value_dim, dtype=dtype)
    bounds = [
        torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    return query, key, value, *bounds, max(lengths_q, default=0), max(lengths_k, default=0)


def one_by_one(query, key, value, bounds_q, bounds_k, _q, _k, starts=None, **arguments):
    outs = []
    for b in range(len(bounds_q) - 1):
        parts = [
            x[bounds[b] : bounds[b + 1]].transpose(0, 1)[None]
            for x, bounds in ((query, bounds_q), (key, bounds_k), (value, bounds_k))
        ]
        if starts is not None:
            arguments["query_start"] = int(starts[b])
        outs.append(ops.attention(*parts, **arguments)[0].transpose(0, 1))
    return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[2])


LENGTHS = [
    ([3, 1, 5], [3, 1, 5]),
    ([4], [4]),
    ([1, 1], [6, 2]),
    ([0, 3, 2], [2, 0, 4]),
    ([5, 2], [3, 9]),
    ([0, 0], [0, 0]),
]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("value_dim", [16, 24])
def test_each_sequence_is_attended_alone(lengths, causal, value_dim):
    arguments = packed(*lengths, value_dim=value_dim)
    found = ops.varlen_attention(*arguments, causal=causal)
    torch.testing.assert_close(found, one_by_one(*arguments, causal=causal))


def test_query_start_and_scale():
    arguments = packed([3, 2], [4, 6])
    found = ops.varlen_attention(*arguments, causal=True, query_start=1, scale=0.3)
    torch.testing.assert_close(found, one_by_one(*arguments, causal=True, query_start=1, scale=0.3))
    starts = torch.tensor([0, 3])
    found = ops.varlen_attention(*arguments, causal=True, query_start=starts)
    torch.testing.assert_close(found, one_by_one(*arguments, causal=True, starts=starts))


def test_logsumexp_is_heads_by_tokens():
    arguments = packed([3, 2], [4, 0])
    out, lse = ops.varlen_attention(*arguments, return_lse=True)
    assert lse.shape == (4, 5) and lse.dtype == torch.float32
    assert (lse[:, 3:] == float("-inf")).all() and (out[3:] == 0).all()
    query, key, value, *_ = arguments
    _, expected = ops.attention(*(x[None].transpose(1, 2) for x in (query[:3], key, value)), return_lse=True)
    torch.testing.assert_close(lse[:, :3], expected[0])


def test_an_upper_bound_need_not_be_the_maximum():
    query, key, value, bounds_q, bounds_k, _, _ = packed([3, 2], [3, 2])
    exact = ops.varlen_attention(query, key, value, bounds_q, bounds_k, 3, 3)
    assert torch.equal(exact, ops.varlen_attention(query, key, value, bounds_q, bounds_k, 100, 64))


def test_gradients_match_the_dense_operation():
    arguments = packed([3, 2], [4, 5], dtype=torch.float64)
    ours = [x.clone().requires_grad_() for x in arguments[:3]]
    theirs = [x.clone().requires_grad_() for x in arguments[:3]]
    ops.varlen_attention(*ours, *arguments[3:], causal=True).sin().sum().backward()
    one_by_one(*theirs, *arguments[3:], causal=True).sin().sum().backward()
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.grad, expected.grad)


def test_dropout_repeats_with_the_seed_and_in_backward():
    query, key, value, *rest = packed([40, 24], [40, 24])
    ones = torch.ones_like(value, requires_grad=True)
    torch.manual_seed(3)
    first = ops.varlen_attention(query, key, ones, *rest, dropout_p=0.3)
    torch.manual_seed(3)
    assert torch.equal(first, ops.varlen_attention(query, key, ones, *rest, dropout_p=0.3))
    (gradient,) = torch.autograd.grad(first.sum(), ones)
    torch.testing.assert_close(gradient.sum(), first.sum())


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (3, torch.tensor([0, 3, 2], dtype=torch.int32), "never decrease"),
        (3, torch.tensor([1, 3, 5], dtype=torch.int32), "start at 0"),
        (4, torch.tensor([0, 3, 4], dtype=torch.int32), "end at 5"),
        (3, torch.tensor([0, 3, 5]), "int32"),
        (3, torch.tensor([0, 5], dtype=torch.int32), "same sequences"),
        (5, 2, "more than its bound 2"),
        (0, torch.randn(5, 3, 16), "3 query heads are not a multiple of 2"),
        (0, torch.randn(5, 4, 8), "head_dim must agree"),
        (1, torch.randn(2, 5, 2, 16), "tokens, heads, head_dim"),
    ],
)
def test_bad_input_is_refused_by_name(index, wrong, message):
    arguments = list(packed([3, 2], [3, 2]))
    arguments[index] = wrong
    with pytest.raises(ValueError, match=message):
        ops.varlen_attention(*arguments)
