"""What shapes the scores of `ops.attention` beyond the mask: window, soft cap, sinks, ALiBi, relative bias;
each in every dtype, in tiles, compiled and differentiated.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest
import torch
from attention_formula import attention_formula
from tolerance import assert_close
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn import ops
from fastattn.ops import attention_cpu, attention_reference

TERMS = {
    "window": dict(window=(3, 2)),
    "left window": dict(window=(3, -1)),
    "right window": dict(window=(-1, 2)),
    "own position alone": dict(window=(0, 0)),
    "causal window": dict(window=(4, 7), causal=True),
    "softcap": dict(softcap=1.5),
    "sinks": dict(sinks=torch.tensor([0.5, -1.0, 4.0, float("-inf")])),
    "causal sinks": dict(sinks=torch.tensor([0.5, -1.0, 4.0, 60.0]), causal=True),
    "alibi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 3.0])),
    "causal alibi": dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 3.0]), causal=True),
    "t5": dict(relative_bias=ops.RelativeBias(torch.linspace(-3, 3, 32).reshape(8, 4), "t5", 20)),
    "t5-causal": dict(
        relative_bias=ops.RelativeBias(torch.linspace(-3, 3, 32).reshape(8, 4), "t5-causal", 20), causal=True
    ),
    "mpnet": dict(relative_bias=ops.RelativeBias(torch.linspace(-3, 3, 32).reshape(8, 4), "mpnet", 20)),
    "everything": dict(
        window=(5, 3),
        softcap=2.0,
        sinks=torch.tensor([0.5, -1.0, 4.0, 0.0]),
        alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 3.0]),
        relative_bias=ops.RelativeBias(torch.linspace(-3, 3, 32).reshape(8, 4), "t5", 20),
        bias=torch.linspace(-2, 2, 23).reshape(1, 1, 1, 23),
        mask=torch.arange(46).reshape(2, 23) % 5 != 1,
        key_lengths=torch.tensor([23, 11]),
    ),
}


def tensors(queries=17, keys=23, dtype=torch.float32):
    return torch.randn(2, 4, queries, 16, dtype=dtype), *torch.randn(2, 2, 2, keys, 16, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_each_term(name, dtype):
    query, key, value = tensors(dtype=dtype)
    exact, exact_lse = attention_formula(query, key, value, torch.float64, **TERMS[name])
    own, own_lse = attention_formula(query, key, value, dtype, **TERMS[name])
    assert_close(ops.attention(query, key, value, **TERMS[name]), own, exact)
    out, lse = ops.attention(query, key, value, **TERMS[name], return_lse=True)
    assert_close(out, own, exact)
    assert lse.dtype == torch.float32
    assert_close(lse, own_lse.float(), exact_lse)


@pytest.mark.parametrize("name", TERMS)
def test_float64_is_exact(name):
    query, key, value = tensors(dtype=torch.float64)
    exact, exact_lse = attention_formula(query, key, value, torch.float64, **TERMS[name])
    plain = ops.attention(query, key, value, **TERMS[name])
    out, lse = ops.attention(query, key, value, **TERMS[name], return_lse=True)
    torch.testing.assert_close(plain, exact, rtol=0, atol=1e-14)
    torch.testing.assert_close(out, exact, rtol=0, atol=1e-14)
    assert torch.equal(lse, exact_lse.float()) or (lse - exact_lse).abs().max() < 1e-6


@pytest.mark.parametrize("start", [-4, 0, 9, 40, torch.tensor([2, -30])], ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_positions_follow_query_start_without_causality_too(name, start):
    query, key, value = tensors()
    exact, _ = attention_formula(query, key, value, torch.float64, **TERMS[name], query_start=start)
    own, _ = attention_formula(query, key, value, torch.float32, **TERMS[name], query_start=start)
    assert_close(ops.attention(query, key, value, **TERMS[name], query_start=start), own, exact)


@pytest.mark.parametrize("name", TERMS)
def test_one_query_one_key_and_nothing(name):
    arguments = {k: v for k, v in TERMS[name].items() if k not in ("bias", "mask", "key_lengths")}
    for queries, keys in ((1, 1), (1, 9), (9, 1), (0, 3), (3, 0)):
        query, key, value = tensors(queries, keys)
        exact, exact_lse = attention_formula(query, key, value, torch.float64, **arguments)
        plain = ops.attention(query, key, value, **arguments)
        out, lse = ops.attention(query, key, value, **arguments, return_lse=True)
        torch.testing.assert_close(plain.double(), exact, rtol=0, atol=1e-6)
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)
        torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "sinks", [None, torch.tensor([1.5, -2.0, 0.0, float("-inf")])], ids=["none", "sinks"]
)
@pytest.mark.parametrize(
    "hidden",
    [
        dict(mask=torch.zeros(2, 23, dtype=torch.bool)),
        dict(key_lengths=torch.zeros(2, dtype=torch.int32)),
        dict(window=(2, 2), query_start=500),
        dict(window=(2, -1), query_start=torch.tensor([500, 90])),
        dict(causal=True, query_start=-100),
        dict(bias=torch.full((1, 1, 1, 23), float("-inf"))),
    ],
    ids=["mask", "key_lengths", "window", "window each", "causal", "bias"],
)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_query_that_sees_nothing_gets_zeros_and_its_sink(hidden, sinks, softcap):
    query, key, value = (x.requires_grad_() for x in tensors())
    arguments = dict(hidden, sinks=sinks, softcap=softcap)
    plain = ops.attention(query, key, value, **arguments)
    out, lse = ops.attention(query, key, value, **arguments, return_lse=True)
    assert (plain == 0).all() and (out == 0).all()
    expected = torch.full((4,), float("-inf")) if sinks is None else sinks
    assert torch.equal(lse, expected[:, None].expand(2, 4, 17))
    for result in (plain, out):
        for gradient in torch.autograd.grad(result.sum(), (query, key, value), retain_graph=True):
            assert (gradient == 0).all()


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_window_reads_only_the_keys_it_can_see(softcap, monkeypatch):
    """Keys out of every query's window may hold NaN; and no tile is given more than it can see."""
    given = []
    tile = attention_cpu._attend_tile
    monkeypatch.setattr(
        attention_cpu, "_attend_tile", lambda *a, **named: (given.append(a[1].shape[2]), tile(*a, **named))[1]
    )
    query, key, value = tensors(700, 1200)
    query_start = 200
    arguments = dict(window=(10, 0), query_start=query_start, softcap=softcap)
    exact, _ = attention_formula(query, key, value, torch.float64, **arguments)
    for x in (key, value):
        x[:, :, : query_start - 10] = float("nan")
        x[:, :, query_start + 700 :] = float("nan")
    found = ops.attention(query, key, value, **arguments)
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
    assert sum(given) < 700 + len(given) * 11 and max(given) <= attention_cpu.MIN_WINDOW_ROWS + 10


@pytest.mark.parametrize("name", TERMS)
def test_no_score_matrix_beyond_the_byte_limit(name, monkeypatch):
    """Forward and backward, every tensor made on the way stays within a tile."""
    monkeypatch.setattr(import_module("fastattn.ops.attention"), "runs_in_pytorch", lambda x: True)
    query, key, value = (x.requires_grad_() for x in tensors())
    expected, expected_lse = ops.attention(query, key, value, **TERMS[name], return_lse=True)
    expected_gradients = torch.autograd.grad(expected.sin().sum(), (query, key, value))
    rows = 4
    limit = 2 * 4 * rows * 23 * 4
    monkeypatch.setattr(attention_reference, "TILE_BYTES", limit)
    monkeypatch.setattr(attention_cpu, "MIN_WINDOW_ROWS", rows)
    with NoTensorOf({planes * 17 * 23 for planes in (1, 2, 4, 8)}):
        found = ops.attention(query, key, value, **TERMS[name])
        out, lse = ops.attention(query, key, value, **TERMS[name], return_lse=True)
        gradients = torch.autograd.grad(found.sin().sum(), (query, key, value))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    torch.testing.assert_close(gradients, expected_gradients)


@pytest.mark.parametrize("name", TERMS)
def test_autograd_keeps_no_score_matrix_beyond_the_byte_limit(name, monkeypatch):
    """Whose tiles together would be one; it computes them again."""
    query, key, value = (x.requires_grad_() for x in tensors())
    monkeypatch.setattr(attention_reference, "TILE_BYTES", 2 * 4 * 4 * 23 * 4)
    kept = []
    for return_lse in (False, True):
        with saved_tensors_hooks(lambda x: (kept.append(x), x)[1], lambda x: x):
            ops.attention(query, key, value, **TERMS[name], return_lse=return_lse)
    # Queries, keys and values may be kept, and which keys there are: the last dimension is the head's.
    assert all(x.shape[-1] in (16, 1) for x in kept), [x.shape for x in kept]


class NoTensorOf(TorchDispatchMode):
    """Fails on a result with as many elements as one of the sizes, those of whole score matrices."""

    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                assert x.numel() not in self.sizes, f"{function} made {list(x.shape)}"
        return result


def test_sinks_take_weight_from_the_keys_and_nothing_else():
    """Softmax over one more logit, whose value is zero."""
    query, key, value = tensors()
    sinks = torch.tensor([0.0, 1.0, -2.0, 30.0])
    without, lse = ops.attention(query, key, value, return_lse=True)
    share = torch.sigmoid(lse - sinks[:, None])[..., None]
    torch.testing.assert_close(ops.attention(query, key, value, sinks=sinks), without * share)


def test_causal_alibi_is_that_of_press_et_al():
    """Their slope * j differs from -slope * |p - j| by a constant of the row."""
    query, key, value = tensors(23, 23)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    bias = slopes[:, None, None] * torch.arange(23)
    torch.testing.assert_close(
        ops.attention(query, key, value, alibi_slopes=slopes, causal=True),
        ops.attention(query, key, value, bias=bias[None], causal=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_values(dtype):
    query, key, value = tensors(dtype=dtype)
    arguments = dict(
        sinks=torch.tensor([1e30, -1e30, 80.0, -80.0]),
        alibi_slopes=torch.tensor([1e4, 1e20, 0.0, 1.0]),
        relative_bias=ops.RelativeBias(torch.linspace(-1e4, 1e4, 32).reshape(8, 4), "t5", 20),
        window=(9, 9),
    )
    for more in ({}, dict(softcap=50.0, scale=1e3), dict(mask=torch.rand(2, 23) > 0.5)):
        exact, _ = attention_formula(query, key, value, torch.float64, **arguments, **more)
        own, _ = attention_formula(query, key, value, dtype, **arguments, **more)
        assert_close(ops.attention(query, key, value, **arguments, **more), own, exact, more)


@pytest.mark.parametrize("name", TERMS)
def test_dropout_drops_or_doubles_the_weights(name):
    """With the identity for values the result is the weights themselves."""
    query, key, _ = tensors()
    value = torch.eye(23).expand(2, 2, 23, 23)
    weights = ops.attention(query, key, value, **TERMS[name])
    dropped = ops.attention(query, key, value, **TERMS[name], dropout_p=0.5)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * weights[kept])
    assert 0.4 < kept[weights != 0].float().mean() < 0.6


@pytest.mark.parametrize("name", TERMS)
def test_autocast_casts_query_key_and_value_alone(name):
    """And neither the scores nor what is added to them."""
    query, key, value = tensors()
    for return_lse in (False, True):
        arguments = TERMS[name] | dict(return_lse=return_lse)
        with torch.autocast("cpu", torch.bfloat16):
            found = ops.attention(query, key, value, **arguments)
        expected = ops.attention(*(x.bfloat16() for x in (query, key, value)), **arguments)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["causal window", "sinks", "alibi", "t5", "everything"])
def test_one_graph_for_all_lengths_but_the_first(name):
    """Lengths from 2 on: the second length makes the graph for every other. (Length 1 makes one more, as
    PyTorch specializes on sizes 0 and 1.)
    """
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    arguments = {k: v for k, v in TERMS[name].items() if k not in ("bias", "mask", "key_lengths")}
    relative = arguments.pop("relative_bias", None)

    def attend(query, key, value, table):
        if relative is not None:
            arguments["relative_bias"] = ops.RelativeBias(table, relative.kind, relative.max_distance)
        return ops.attention(query, key, value, **arguments, return_lse=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    table = None if relative is None else relative.table
    for queries, keys in ((4, 6), (5, 9), (6, 7), (17, 40), (2, 2), (30, 30)):
        given = (*tensors(queries, keys), table)
        torch.testing.assert_close(compiled(*given), attend(*given))
    assert len(graphs) <= 2, len(graphs)


@pytest.mark.parametrize("name", ["causal window", "softcap", "everything"])
def test_compiled_gradients(name):
    query, key, value = (x.requires_grad_() for x in tensors())
    torch._dynamo.reset()

    def attend(query, key, value):
        return ops.attention(query, key, value, **TERMS[name])

    expected = torch.autograd.grad(attend(query, key, value).sin().sum(), (query, key, value))
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(query, key, value).sin().sum(), (query, key, value))
    torch.testing.assert_close(found, expected)


def test_gradients_numerically():
    """Of everything that has one, on the fused path and on the reference's."""
    torch.manual_seed(0)
    double = dict(dtype=torch.float64, requires_grad=True)
    query, key, value = torch.randn(1, 2, 2, 2, **double), *torch.randn(2, 1, 1, 3, 2, **double)
    bias, sinks, slopes = torch.randn(1, 1, 2, 3, **double), torch.randn(2, **double), torch.rand(2, **double)
    table = torch.randn(4, 2, **double)

    def attend(return_lse, query, key, value, bias, sinks, slopes, table):
        result = ops.attention(
            query,
            key,
            value,
            bias=bias,
            sinks=sinks,
            alibi_slopes=slopes,
            relative_bias=ops.RelativeBias(table, "t5", 4),
            softcap=1.5,
            window=(1, 1),
            return_lse=return_lse,
        )
        # The logsumexp is float32, too coarse for differences.
        return result[0] if return_lse else result

    for return_lse in (False, True):
        leaves = (query, key, value, bias, sinks, slopes, table)
        assert torch.autograd.gradcheck(partial(attend, return_lse), leaves)
