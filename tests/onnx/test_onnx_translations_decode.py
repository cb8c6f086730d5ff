"""ONNX subgraphs of decode attention, contiguous and paged, in float, int8 and float8, at other shapes."""

from __future__ import annotations

import functools

import pytest
import torch

from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from exported_cases import Exported, assert_close, in_float64

HEADS, KV_HEADS, DIM, VALUE_DIM, BLOCK = 4, 2, 8, 6, 4
BUCKETS, FURTHEST = 8, 9


def call(paged=False, quantized=None, lse=False, relative=False, **arguments):
    """A call of decode_attention; a str among the arguments names an input."""
    keys, values = ("key_pages", "value_pages") if paged else ("keys", "values")

    def run(x):
        named = {name: x[v] if isinstance(v, str) else v for name, v in arguments.items()}
        key, value = x[keys], x[values]
        if quantized is not None:
            # Whole numbers in reach of both dtypes, which numpy has not.
            key, value = ((t * 9).round().clamp(-15, 15).to(quantized) for t in (key, value))
            named |= {name: x[name].float() for name in ("key_scale", "value_scale")}
        if relative:
            named["relative_bias"] = ops.RelativeBias(x["table"], "t5-causal", FURTHEST)
        pages = x["pages"] if paged else None
        return ops.decode_attention(x["query"], key, value, x["lengths"], pages, return_lse=lse, **named)

    return run


EVERYTHING = {"alibi_slopes": "slopes", "window": 5, "scale": 0.4, "softcap": 1.5, "sinks": "sinks"}
CASES = {
    "contiguous": call(),
    "paged": call(paged=True),
    "logsumexp": call(lse=True),
    "logsumexp, paged, with sinks": call(paged=True, sinks="sinks", lse=True),
    "window": call(window=3),
    "window, paged": call(paged=True, window=0),
    "window of a quarter of the cache": lambda x: call(window=x["keys"].shape[2] // 4)(x),
    "soft-capped": call(softcap=1.5, scale=0.8),
    "relative bias": call(relative=True),
    "alibi, paged": call(paged=True, alibi_slopes="slopes"),
    "int8": call(quantized=torch.int8),
    "int8, paged": call(paged=True, quantized=torch.int8),
    "float8": call(quantized=torch.float8_e4m3fn),
    "everything at once": call(relative=True, lse=True, **EVERYTHING),
    "everything at once, paged, int8": call(True, torch.int8, True, True, **EVERYTHING),
}


def inputs_of(batch, queries, capacity, blocks, lengths=None):
    """A cache of `capacity` keys a sequence, and `blocks` pages; garbage wherever no key is."""
    table_width = capacity // BLOCK
    lengths = torch.randint(0, capacity + 1, (batch,)) if lengths is None else torch.tensor(lengths)
    absent = torch.arange(capacity) >= lengths[:, None]
    pages = torch.randint(0, blocks, (batch, table_width), dtype=torch.int32)
    unused = torch.arange(table_width) * BLOCK >= lengths[:, None]
    return {
        "query": torch.randn(batch, queries, HEADS, DIM).transpose(1, 2),
        "keys": torch.randn(batch, KV_HEADS, capacity, DIM).masked_fill(absent[:, None, :, None], 1e30),
        "values": torch.randn(batch, KV_HEADS, capacity, VALUE_DIM),
        "key_pages": torch.randn(blocks, BLOCK, KV_HEADS, DIM),
        "value_pages": torch.randn(blocks, BLOCK, KV_HEADS, VALUE_DIM),
        "pages": pages.masked_fill(unused, -1),
        "lengths": lengths.to(torch.int32),
        "key_scale": torch.rand(KV_HEADS),
        "value_scale": torch.rand(KV_HEADS),
        "table": torch.randn(BUCKETS, HEADS),
        "slopes": torch.rand(HEADS),
        "sinks": torch.randn(HEADS),
    }


@functools.cache
def export(target):
    inputs = inputs_of(3, 5, 20, 7)
    sizes = {3: "batch", 5: "queries", 7: "blocks", 20: "capacity"}
    dynamic = {
        name: {i: sizes[size] for i, size in enumerate(x.shape) if size in sizes}
        for name, x in inputs.items()
    }
    return Exported(CASES, inputs, dynamic, target)


@pytest.fixture(scope="module", params=["cpu", "standard"])
def exported(request):
    return export(request.param)


SHAPES = {
    "as traced": (3, 5, 20, 7),
    "one token": (2, 1, 32, 9),
    "one sequence, no key": (1, 2, 8, 2, [0]),
    "one key": (2, 1, 4, 3, [1, 1]),
    "more new tokens than keys": (2, 4, 12, 3, [2, 12]),
}


@pytest.fixture(scope="module", params=SHAPES)
def results(request, exported):
    torch.manual_seed(1)
    inputs = inputs_of(*SHAPES[request.param])
    return request.param, inputs, exported.run(inputs)


@pytest.mark.parametrize("name", CASES)
def test_decode_attention(name, results):
    shape, inputs, found = results
    exact, own = CASES[name](in_float64(inputs)), CASES[name](inputs)
    exact, own = (x if isinstance(x, tuple) else (x,) for x in (exact, own))
    for got, mine, wanted in zip(found[name], own, exact, strict=True):
        assert_close(got, mine, wanted, (name, shape))


def test_rows_that_nobody_sees_may_hold_anything(exported):
    """NaN past each sequence's end, and before its window."""
    inputs = inputs_of(2, 1, 16, 4, [9, 16])
    clean = exported.run(inputs)
    numbers, lengths = torch.arange(16), inputs["lengths"][:, None]
    for case, seen in (
        ("contiguous", numbers < lengths),
        ("window", (numbers < lengths) & (numbers >= lengths - 4)),
    ):
        broken = {
            name: inputs[name].masked_fill(~seen[:, None, :, None], torch.nan) for name in ("keys", "values")
        }
        torch.testing.assert_close(exported.run({**inputs, **broken})[case], clean[case], rtol=0, atol=0)
