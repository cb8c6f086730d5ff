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


TERMS = {
    "window": dict(window=(2, 1)),
    "causal window": dict(window=(2, -1), causal=True),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 4.0, float("-inf")])),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 3.0])),
    "t5": dict(relative_bias=ops.RelativeBias(torch.linspace(-3, 3, 32).reshape(8, 4), "t5", 12)),
    "everything": dict(
        causal=True,
        window=(3, 0),
        softcap=2.0,
        sinks=torch.tensor([0.5, -1.0, 4.0, 0.0]),
        alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 3.0]),
        relative_bias=ops.RelativeBias(torch.linspace(-3, 3, 32).reshape(8, 4), "t5-causal", 12),
    ),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_every_term_counts_within_its_sequence(name, lengths):
    arguments = packed(*lengths)
    starts = torch.arange(len(lengths[0])) * 2 - 1
    expected = one_by_one(*arguments, **TERMS[name])
    torch.testing.assert_close(ops.varlen_attention(*arguments, **TERMS[name]), expected)
    out, lse = ops.varlen_attention(*arguments, **TERMS[name], return_lse=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (4, sum(lengths[0])) and not lse.isnan().any()
    torch.testing.assert_close(
        ops.varlen_attention(*arguments, **TERMS[name], query_start=starts),
        one_by_one(*arguments, starts=starts, **TERMS[name]),
    )


@pytest.mark.parametrize("name", TERMS)
def test_a_batch_of_sequences_of_one_length_is_the_dense_operation(name):
    query, key, value, *bounds = packed([6, 6, 6], [9, 9, 9])
    found = ops.varlen_attention(query, key, value, *bounds, **TERMS[name])
    expected = ops.attention(
        *(x.unflatten(0, (3, -1)).transpose(1, 2) for x in (query, key, value)), **TERMS[name]
    )
    torch.testing.assert_close(found, expected.transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("lengths", [([3, 2], [0, 0]), ([0, 0], [3, 2]), ([], [])], ids=str)
def test_no_keys_no_queries_no_sequences(lengths):
    sinks = torch.tensor([0.5, -1.0, 4.0, float("-inf")])
    for given in (None, sinks):
        out, lse = ops.varlen_attention(*packed(*lengths), sinks=given, return_lse=True)
        assert out.shape == (sum(lengths[0]), 4, 16) and (out == 0).all()
        expected = torch.full((4,), float("-inf")) if given is None else given
        assert torch.equal(lse, expected[:, None].expand(4, sum(lengths[0])))
        assert (ops.varlen_attention(*packed(*lengths), sinks=given) == 0).all()


@pytest.mark.parametrize("name", TERMS)
def test_gradients_reach_every_term(name):
    """Against the dense operation, whose gradients are checked numerically."""
    gradients = []
    for attend in (ops.varlen_attention, one_by_one):
        torch.manual_seed(0)
        query, key, value, *bounds = packed([3, 2], [4, 5], dtype=torch.float64)
        terms = dict(TERMS[name])
        leaves = [x.requires_grad_() for x in (query, key, value)]
        for term in ("sinks", "alibi_slopes"):
            if term in terms:
                terms[term] = terms[term].double().requires_grad_()
                leaves.append(terms[term])
        if "relative_bias" in terms:
            given = terms["relative_bias"]
            leaves.append(given.table.double().requires_grad_())
            terms["relative_bias"] = ops.RelativeBias(leaves[-1], given.kind, given.max_distance)
        out = attend(query, key, value, *bounds, **terms)
        gradients.append(torch.autograd.grad(out.sin().sum(), leaves))
    torch.testing.assert_close(*gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


@pytest.mark.parametrize("name", ["causal window", "t5", "everything"])
def test_one_graph_for_all_lengths(name):
    """Lengths and numbers of sequences from 2 on; 1 makes one more, as PyTorch specializes on it."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def attend(query, key, value, bounds_q, bounds_k):
        terms = TERMS[name]
        return ops.varlen_attention(
            query, key, value, bounds_q, bounds_k, query.shape[0], key.shape[0], **terms, return_lse=True
        )

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for lengths in (
        ([3, 4], [5, 4]),
        ([2, 9, 3], [2, 7, 7]),
        ([1, 1, 1, 1], [8, 2, 0, 5]),
        ([30, 2], [20, 40]),
    ):
        given = packed(*lengths)[:5]
        torch.testing.assert_close(compiled(*given), attend(*given))
    assert len(graphs) <= 2, len(graphs)


def test_autocast_and_compiled_gradients():
    arguments = packed([5, 3], [5, 4])
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.varlen_attention(*arguments, **TERMS["everything"])
    half = [x.bfloat16() for x in arguments[:3]]
    assert torch.equal(out, ops.varlen_attention(*half, *arguments[3:], **TERMS["everything"]))

    leaves = [x.requires_grad_() for x in arguments[:3]]
    torch._dynamo.reset()
    attend = torch.compile(ops.varlen_attention, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(attend(*arguments, **TERMS["everything"]).sin().sum(), leaves)
    expected = torch.autograd.grad(
        ops.varlen_attention(*arguments, **TERMS["everything"]).sin().sum(), leaves
    )
    torch.testing.assert_close(found, expected)
