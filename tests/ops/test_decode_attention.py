"""`ops.decode_attention` on the PyTorch path: right for every cache, and clear about what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_cases import FP8, INT8, DecodeCase, decode_cases, decode_formula
from hypothesis import given, settings
from tolerance import assert_close

from fastattn import ops
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.decode_cache import DecodeCache
from fastattn.ops.decode_reference import decode_attention_reference

PLAIN = DecodeCase(
    seed=0, dtype=torch.float32, cache_dtype=None, lengths=(70, 33), capacity=70, queries=3, key_heads=2,
    group=3, head_dim=16, value_dim=24, block_size=0, layout="plain", window=-1, scale=0.25, softcap=0.0,
    sinks=False, alibi=False, relative=None,
)  # fmt: skip
CACHE = ("key_cache", "value_cache", "cache_lengths", "block_table", "key_scale", "value_scale")


def call(case: DecodeCase, **changes: Any) -> Any:
    tensors = case.tensors
    relative = tensors["relative"]
    arguments = {name: tensors[name] for name in ("query", *CACHE, "alibi_slopes", "sinks")}
    arguments["relative_bias"] = None if relative is None else ops.RelativeBias(*relative)
    arguments |= dict(window=None if case.window < 0 else case.window, scale=case.scale, softcap=case.softcap)
    return ops.decode_attention(**arguments | changes)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(decode_cases((torch.float32, torch.float16, torch.bfloat16), rows=96))
def test_every_combination(case: DecodeCase) -> None:
    exact, exact_lse = case.expected(torch.float64)
    own, own_lse = case.expected(case.dtype)
    assert_close(call(case), own, exact, case)
    out, lse = call(case, return_lse=True)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    assert_close(out, own, exact, case)
    finite = exact_lse.isfinite()
    assert torch.equal(lse.double()[~finite], exact_lse[~finite])
    assert_close(lse[finite], own_lse[finite], exact_lse[finite], case)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(decode_cases((torch.float64,)))
def test_the_reference_is_the_formula(case: DecodeCase) -> None:
    tensors = case.tensors
    table, kind, distance = tensors["relative"] or (None, "t5", 0)
    terms = AttentionTerms(
        rel_table=table, rel_kind=kind, rel_max_distance=distance, alibi_slopes=tensors["alibi_slopes"],
        window_left=case.window, scale=case.scale, softcap=case.softcap, sinks=tensors["sinks"],
        return_lse=True,
    )  # fmt: skip
    cache = DecodeCache(**{name: tensors[name] for name in CACHE})
    found = decode_attention_reference(tensors["query"], cache, terms)
    for ours, exact in zip(found, case.expected(torch.float64), strict=True):
        torch.testing.assert_close(ours, exact)


@pytest.mark.parametrize("queries", [1, 4, 16])
@pytest.mark.parametrize("window", [None, 9])
def test_decoding_is_attention_over_the_cache(window: int | None, queries: int) -> None:
    tensors = replace(PLAIN, queries=queries, sinks=True, alibi=True).tensors
    query, lengths = tensors["query"], tensors["cache_lengths"]
    named = {name: tensors[name] for name in ("sinks", "alibi_slopes")}
    found = ops.decode_attention(
        query, tensors["key_cache"], tensors["value_cache"], lengths, window=window, **named
    )
    expected = ops.attention(
        query,
        tensors["key_cache"],
        tensors["value_cache"],
        causal=True,
        key_lengths=lengths,
        query_start=lengths - queries,
        window=None if window is None else (window, -1),
        **named,
    )
    torch.testing.assert_close(found, expected)


def test_the_forms_of_a_window_agree() -> None:
    expected = call(PLAIN, window=9)
    for window in ((9, 0), (9, -1)):
        assert torch.equal(call(PLAIN, window=window), expected)
    for unbounded in (-1, (-1, 0), 1000):
        torch.testing.assert_close(call(PLAIN, window=unbounded), call(PLAIN))


def test_no_sequences() -> None:
    query, cache, lengths = (
        torch.randn(0, 4, 1, 8),
        torch.randn(0, 2, 5, 8),
        torch.zeros(0, dtype=torch.int32),
    )
    out, lse = ops.decode_attention(query, cache, cache, lengths, return_lse=True)
    assert out.shape == (0, 4, 1, 8) and lse.shape == (0, 4, 1)


def test_autocast_leaves_a_quantized_cache_alone() -> None:
    for cache_dtype in (None, FP8, INT8):
        case = replace(PLAIN, cache_dtype=cache_dtype, value_dim=16)
        with torch.autocast("cpu", torch.bfloat16):
            out = call(case)
        assert out.dtype == torch.bfloat16
        exact = case.expected(torch.float64)[0]
        assert (out.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


GRADIENT_CASES = {
    "contiguous": PLAIN,
    "paged": replace(PLAIN, block_size=16, queries=1),
    "terms": replace(PLAIN, window=20, softcap=2.0, sinks=True, alibi=True, relative="t5"),
    "int8": replace(PLAIN, cache_dtype=INT8, block_size=5),
}


@pytest.mark.parametrize("registered", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_are_the_formula_s(name: str, registered: bool) -> None:
    case = replace(GRADIENT_CASES[name], dtype=torch.float64)
    tensors = dict(case.tensors)
    wanted = ["query", "sinks", "alibi_slopes"]
    if case.cache_dtype is None:
        wanted += ["key_cache", "value_cache"]
    leaves = {
        name: tensors[name].detach().clone().requires_grad_() for name in wanted if tensors[name] is not None
    }
    tensors |= leaves
    table, kind, distance = tensors["relative"] or (None, "t5", 0)
    if table is not None:
        leaves["table"] = table = table.clone().requires_grad_()
    if registered:
        out, _ = torch.ops.fastattn.decode_attention(
            *(tensors[name] for name in ("query", *CACHE)), table, kind, distance, tensors["alibi_slopes"],
            case.window, case.scale, case.softcap, tensors["sinks"], False,
        )  # fmt: skip
    else:
        bias = None if table is None else ops.RelativeBias(table, kind, distance)
        named = {name: tensors[name] for name in ("alibi_slopes", "sinks")}
        out = call(case, query=tensors["query"], key_cache=tensors["key_cache"],
                   value_cache=tensors["value_cache"], relative_bias=bias, **named)  # fmt: skip
    found = torch.autograd.grad(out.sin().sum(), list(leaves.values()))

    # The formula on the dense keys, and its gradients scattered to where the cache has them.
    key, value = (case.tensors[name].clone().requires_grad_() for name in ("key", "value"))
    expected_out, _ = decode_formula(
        tensors["query"], key, value, tensors["cache_lengths"], torch.float64, window=case.window,
        scale=case.scale, softcap=case.softcap, sinks=tensors["sinks"], alibi_slopes=tensors["alibi_slopes"],
        relative=None if table is None else (table, kind, distance),
    )  # fmt: skip
    plain = {name: leaf for name, leaf in leaves.items() if "cache" not in name}
    expected = torch.autograd.grad(expected_out.sin().sum(), [*plain.values(), key, value])
    for leaf, gradient in zip(leaves, found, strict=True):
        if leaf in plain:
            torch.testing.assert_close(gradient, expected[list(plain).index(leaf)])
            continue
        dense = expected[-2] if leaf == "key_cache" else expected[-1]
        if case.block_size:
            pages = tensors["block_table"]
            rows = [
                gradient[pages[b, j // case.block_size], j % case.block_size]
                for b, length in enumerate(case.lengths)
                for j in range(length)
            ]
            dense = torch.cat([dense[b, :, :n].transpose(0, 1) for b, n in enumerate(case.lengths)])
            gradient = torch.stack(rows)
        torch.testing.assert_close(gradient, dense)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_opcheck(name: str) -> None:
    # Not fp8: PyTorch's check itself multiplies every argument, which it cannot in that dtype.
    case = GRADIENT_CASES[name]
    tensors = case.tensors
    query = tensors["query"].clone().requires_grad_()
    # Without NaN in the rows that are not read: the checks compare outputs, and gradients of the caches.
    caches = [x if case.cache_dtype is not None else x.nan_to_num() for x in (tensors[n] for n in CACHE[:2])]
    results = torch.library.opcheck(
        torch.ops.fastattn.decode_attention.default,
        (
            query, *caches, *(tensors[name] for name in CACHE[2:]), *(tensors["relative"] or (None, "t5", 0)),
            tensors["alibi_slopes"], case.window, case.scale, case.softcap, tensors["sinks"], True,
        ),
    )  # fmt: skip
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("block_size", [0, 16])
def test_compiled_over_changing_lengths_is_at_most_two_graphs(block_size: int) -> None:
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: object) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: torch.Tensor) -> Any:
        return ops.decode_attention(query, key, value, *rest, window=40) + 1

    compiled = torch.compile(decode, backend=backend, fullgraph=True)
    for capacity, lengths in ((64, (64, 3)), (48, (1, 40)), (80, (0, 77)), (112, (112, 5)), (32, (32, 31))):
        case = replace(PLAIN, queries=1, block_size=block_size, capacity=capacity, lengths=lengths, window=40)
        tensors = [case.tensors[name] for name in ("query", *CACHE[:3])]
        if block_size:
            tensors.append(case.tensors["block_table"])
        torch.testing.assert_close(compiled(*tensors), decode(*tensors))
    assert graphs <= 2


def test_the_operator_stores_heads_last() -> None:
    with torch.no_grad():
        tensors = PLAIN.tensors
        out, lse = torch.ops.fastattn.decode_attention(
            *(tensors[name] for name in ("query", *CACHE)), None, "t5", 0, None, -1, 0.25, 0.0, None, False
        )
    assert out.transpose(1, 2).is_contiguous() and lse.shape == (0,)


PAGED = replace(PLAIN, block_size=16)
QUANTIZED = replace(PLAIN, cache_dtype=INT8)


@pytest.mark.parametrize(
    ("case", "name", "wrong", "message"),
    [
        (PLAIN, "query", torch.randn(2, 6, 17, 16), "query holds 17 new tokens; it takes 1 to 16"),
        (PLAIN, "query", torch.randn(2, 6, 0, 16), "query holds 0 new tokens"),
        (PLAIN, "query", torch.randn(2, 5, 3, 16), "5 query heads are not a multiple of the 2 heads"),
        (PLAIN, "query", torch.randn(2, 6, 3, 8), "key_cache and query in the last"),
        (PLAIN, "query", torch.randn(3, 6, 3, 16), "must hold the 3 sequences"),
        (PLAIN, "query", torch.randn(6, 3, 16), r"query must be \[batch, heads, length, head_dim\]"),
        (PAGED, "key_cache", torch.randn(10, 16, 16), r"\[blocks, block_size, heads, head_dim\]"),
        (PLAIN, "value_cache", torch.randn(2, 2, 69, 16), "key_cache and value_cache must agree"),
        (PLAIN, "query", torch.ones(2, 6, 3, 16, dtype=torch.int64), "query is torch.int64"),
        (PLAIN, "key_cache", torch.ones(2, 2, 70, 16).half(), "key_cache is torch.float16; accepted"),
        (PLAIN, "value_cache", torch.ones(2, 2, 70, 16).half(), "value_cache is torch.float16 but"),
        (PLAIN, "key_cache", torch.empty(2, 2, 70, 16, device="meta"), "key_cache is on meta"),
        (PLAIN, "cache_lengths", torch.tensor([71, 3]), "cache_lengths holds 71; the cache takes 0 to 70"),
        (PLAIN, "cache_lengths", torch.tensor([-1, 3]), "cache_lengths holds -1"),
        (PLAIN, "cache_lengths", torch.tensor([3.0, 3.0]), "cache_lengths must be an int32 or int64"),
        (PLAIN, "cache_lengths", torch.tensor([3]), r"cache_lengths must be .* \[2\]"),
        (PAGED, "cache_lengths", torch.tensor([81, 3]), "0 to 80 keys, its pages x block_size"),
        (PAGED, "block_table", torch.zeros(2, 5), "block_table must be an int32 or int64"),
        (PAGED, "block_table", torch.zeros(3, 5, dtype=torch.int32), "block_table must be"),
        (PAGED, "block_table", torch.full((2, 5), 13, dtype=torch.int32), r"block_table\[0, 0\] is 13"),
        (PAGED, "block_table", torch.full((2, 5), -1, dtype=torch.int32), "key_cache has pages 0 to 12"),
        (PLAIN, "key_scale", torch.ones(2), "key_scale goes with an int8 or float8_e4m3fn cache"),
        (PLAIN, "value_scale", torch.ones(2), "value_scale goes with an int8"),
        (QUANTIZED, "key_scale", None, "a cache of torch.int8 needs key_scale"),
        (QUANTIZED, "value_scale", None, "needs value_scale, float32"),
        (QUANTIZED, "key_scale", torch.ones(3), r"key_scale must be float32 \[cache heads\] = \[2\]"),
        (QUANTIZED, "key_scale", torch.ones(2).double(), "got torch.float64"),
        (PLAIN, "window", (3, 1), "no key follows a query's own"),
        (PLAIN, "window", -2, "must be >= -1"),
        (PLAIN, "window", 2.5, "must be a pair of ints"),
        (PLAIN, "alibi_slopes", torch.ones(2), r"alibi_slopes must be \[query heads\] = \[6\]"),
        (PLAIN, "sinks", torch.ones(6, dtype=torch.int64), "sinks is torch.int64"),
        (PLAIN, "relative_bias", ops.RelativeBias(torch.ones(8, 2)), r"relative_bias.table"),
        (PLAIN, "softcap", -1.0, "softcap is -1.0"),
        (PLAIN, "scale", float("nan"), "scale is nan"),
    ],
)
def test_bad_input_is_refused_by_name(case: DecodeCase, name: str, wrong: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(case, **{name: wrong})


def test_pages_that_no_key_uses_are_not_checked() -> None:
    # A window of 20 over 70 keys leaves the first two pages of 16 to others; the table's last is not reached.
    case = replace(PAGED, lengths=(70,), capacity=96, queries=1, window=20)
    table = case.tensors["block_table"]
    assert table[0].tolist()[:3] == [-1, 10**6, -1] and table[0, 5] == 10**6
    exact, own = (case.expected(dtype)[0] for dtype in (torch.float64, torch.float32))
    assert_close(call(case), own, exact)
    with pytest.raises(ValueError, match=r"block_table\[0, 2\] is -1"):
        call(case, window=30)
