"""ONNX subgraphs of relative bias, ALiBi, windows, soft-capping and sinks, dense and packed."""

from __future__ import annotations

import functools

import pytest
import torch

from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from exported_cases import Exported, assert_close, in_float64

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6
# Small enough that the lengths below reach every bucket and beyond.
BUCKETS, FURTHEST = 8, 9


def call(operation, *positional, lse=False, **arguments):
    """A call of `operation`: a str names an input, a tuple (kind, input) is a relative bias."""

    def value(x, given):
        if isinstance(given, tuple) and isinstance(given[0], str):
            return ops.RelativeBias(x[given[1]], given[0], FURTHEST)
        return x[given] if isinstance(given, str) else given

    def run(x):
        named = {name: value(x, given) for name, given in arguments.items()}
        return operation(*(value(x, given) for given in positional), return_lse=lse, **named)

    return run


def dense(key="key", value="value", **arguments):
    return call(ops.attention, "query", key, value, **arguments)


def grouped(**arguments):
    return dense("few_keys", "few_values", **arguments)


EVERYTHING = {
    "relative_bias": ("t5", "table"),
    "alibi_slopes": "slopes",
    "causal": True,
    "window": (4, 0),
    "scale": 0.4,
    "softcap": 1.5,
    "sinks": "sinks",
}

DENSE = {
    "t5": dense(relative_bias=("t5", "table")),
    "t5 under a padding mask": dense(relative_bias=("t5", "table"), mask="mask"),
    "causal t5": dense(relative_bias=("t5-causal", "table"), causal=True),
    "causal t5, not masked": dense(relative_bias=("t5-causal", "table")),
    "mpnet": dense(relative_bias=("mpnet", "table"), scale=0.3),
    "t5 from each row's own start": dense(relative_bias=("t5", "table"), query_start="starts"),
    "t5 and a bias": dense(relative_bias=("t5", "table"), bias="bias"),
    "alibi": dense(alibi_slopes="slopes"),
    "alibi and t5": dense(alibi_slopes="slopes", relative_bias=("t5", "table")),
    "alibi, causal from a start": dense(alibi_slopes="slopes", causal=True, query_start=2),
    "alibi of grouped heads from each row's own start": grouped(alibi_slopes="slopes", query_start="starts"),
    "window": dense(window=(2, 1)),
    "window to the left": dense(window=(3, -1)),
    "window to the right": dense(window=(-1, 2)),
    "window, causal": dense(window=(2, 5), causal=True),
    "window that leaves rows nothing": dense(window=(1, 1), query_start=-3),
    "window from each row's own start": grouped(window=(2, 1), query_start="starts"),
    "window of half the keys": lambda x: ops.attention(
        x["query"], x["key"], x["value"], window=(x["key"].shape[2] // 2, x["key"].shape[2] // 4)
    ),
    "window under a mask": dense(window=(2, 2), mask="mask4"),
    "soft-capped": dense(softcap=2.0),
    "soft-capped with bias": dense(softcap=0.5, bias="bias", scale=0.9),
    "sinks": dense(sinks="sinks", lse=True),
    "sinks of rows that see nothing": dense(
        sinks="sinks", mask="mask", causal=True, query_start=-1, lse=True
    ),
    "sinks of grouped heads": grouped(sinks="sinks"),
    "everything at once": grouped(**EVERYTHING, bias="bias", mask="mask", key_lengths="lengths", lse=True),
}
FUSED = ("t5", "t5 under a padding mask", "causal t5, not masked", "mpnet",
         "t5 from each row's own start", "alibi", "alibi and t5")  # fmt: skip
BEYOND_STANDARD = [name for name in DENSE if {"bias", "sinks", "everything"} & set(name.split())]


def terms():
    return {
        "table": torch.randn(BUCKETS, HEADS),
        "slopes": torch.rand(HEADS),
        "sinks": torch.randn(HEADS),
    }


def dense_inputs(batch, queries, keys):
    mask = torch.rand(batch, keys) > 0.4
    mask[0] = False
    return {
        "query": torch.randn(batch, queries, HEADS, DIM).transpose(1, 2),
        "key": torch.randn(batch, HEADS, keys, DIM),
        "value": torch.randn(batch, HEADS, keys, DIM),
        "few_keys": torch.randn(batch, KV_HEADS, keys, DIM),
        "few_values": torch.randn(batch, KV_HEADS, keys, VALUE_DIM),
        "mask": mask,
        "mask4": torch.rand(batch, 1, queries, keys) > 0.4,
        "bias": torch.randn(1, HEADS, queries, keys),
        "lengths": torch.randint(0, keys + 1, (batch,)),
        "starts": torch.randint(-1, keys, (batch,)),
        **terms(),
    }


@functools.cache
def export_dense(target):
    inputs = dense_inputs(3, 5, 7)
    dynamic = {
        name: {i: "dynamic" for i, size in enumerate(x.shape) if size in (3, 5, 7)}
        for name, x in inputs.items()
    }
    return Exported(DENSE, inputs, dynamic, target)


@pytest.fixture(scope="module", params=["cpu", "standard"])
def dense_model(request):
    return export_dense(request.param)


@pytest.fixture(scope="module", params=[(3, 5, 7), (2, 26, 26), (1, 1, 12), (4, 13, 1)], ids=str)
def dense_results(request, dense_model):
    torch.manual_seed(1)
    inputs = dense_inputs(*request.param)
    return request.param, inputs, dense_model.run(inputs)


@pytest.mark.parametrize("name", DENSE)
def test_attention(name, dense_results):
    assert_case(DENSE[name], name, *dense_results)


def assert_case(case, name, shape, inputs, results):
    exact, own = case(in_float64(inputs)), case(inputs)
    exact, own = (x if isinstance(x, tuple) else (x,) for x in (exact, own))
    for found, mine, wanted in zip(results[name], own, exact, strict=True):
        assert_close(found, mine, wanted, (name, shape))


def test_relative_bias_and_alibi_are_inputs_of_the_fused_operator(dense_model):
    """ai.onnx's operator has one input for bias and mask, and computes windows and soft-capping too."""
    fused = [node for node in dense_model.model.graph if node.op_type in ("MultiHeadAttention", "Attention")]
    if dense_model.target == "standard":
        assert len(fused) == len(DENSE) - len(BEYOND_STANDARD)
        return
    assert len(fused) == len(FUSED)
    assert all(len(node.inputs) == 6 and node.inputs[5] is not None for node in fused)


def packed(key="key", value="value", **arguments):
    return call(ops.varlen_attention, "query", key, value, "bounds_q", "bounds_k", 64, 64, **arguments)


def packed_groups(**arguments):
    return packed("few_keys", "few_values", **arguments)


PACKED = {
    "t5": packed(relative_bias=("t5", "table")),
    "causal t5": packed(relative_bias=("t5-causal", "table"), causal=True),
    "mpnet": packed(relative_bias=("mpnet", "table")),
    "mpnet of grouped heads": packed_groups(relative_bias=("mpnet", "table")),
    "t5 from a start": packed(relative_bias=("t5", "table"), query_start=3),
    "t5 from each sequence's own start": packed(relative_bias=("t5", "table"), query_start="starts"),
    "alibi": packed(alibi_slopes="slopes"),
    "alibi and mpnet": packed(alibi_slopes="slopes", relative_bias=("mpnet", "table")),
    "window": packed(window=(2, 1)),
    "window from each sequence's own start": packed_groups(window=(1, -1), query_start="starts"),
    "soft-capped": packed(softcap=2.0),
    "sinks": packed(sinks="sinks", lse=True),
    "everything at once": packed_groups(**EVERYTHING, lse=True),
}
LOOPS = ("t5", "mpnet", "t5 from a start", "t5 from each sequence's own start", "alibi", "alibi and mpnet")

LENGTHS = [
    ([3, 2, 6], [4, 2, 5]),
    ([25], [29]),
    ([1, 14, 1, 1], [1, 3, 17, 2]),
    ([0, 3, 2, 1], [2, 0, 4, 0]),
    ([2, 1], [0, 0]),
]


def packed_inputs(lengths_q, lengths_k):
    queries, keys = sum(lengths_q), sum(lengths_k)
    bounds = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    ]
    return {
        "query": torch.randn(queries, HEADS, DIM),
        "key": torch.randn(keys, HEADS, DIM),
        "value": torch.randn(keys, HEADS, DIM),
        "few_keys": torch.randn(keys, KV_HEADS, DIM),
        "few_values": torch.randn(keys, KV_HEADS, VALUE_DIM),
        "bounds_q": bounds[0],
        "bounds_k": bounds[1],
        "starts": torch.randint(-1, 4, (len(lengths_q),)),
        **terms(),
    }


@functools.cache
def export_packed(target):
    inputs = packed_inputs(*LENGTHS[0])
    dynamic = {name: {} if name in terms() else {0: "dynamic"} for name in inputs}
    return Exported(PACKED, inputs, dynamic, target)


@pytest.fixture(scope="module", params=["cpu", "standard", "cuda"])
def packed_model(request):
    return export_packed(request.param)


@pytest.fixture(scope="module", params=LENGTHS, ids=str)
def packed_results(request, packed_model):
    torch.manual_seed(1)
    inputs = packed_inputs(*request.param)
    return request.param, inputs, packed_model.run(inputs)


@pytest.mark.parametrize("name", PACKED)
def test_varlen_attention(name, packed_results):
    assert_case(PACKED[name], name, *packed_results)


def test_relative_bias_and_alibi_stay_in_the_loop_over_sequences(packed_model):
    """Made for each sequence's own lengths, inside; only what the fused operator cannot say is padded."""
    import onnx_ir as ir

    nodes = ir.traversal.RecursiveGraphIterator(packed_model.model.graph)
    loops = [node for node in nodes if node.op_type == "Loop"]
    beyond = sum("sinks" in name or "everything" in name for name in PACKED)
    assert len(loops) == {"cpu": len(LOOPS), "standard": len(PACKED) - beyond, "cuda": 0}[packed_model.target]
    for loop in loops:
        (branch,) = (n for n in loop.attributes["body"].as_graph() if n.op_type == "If")
        (fused,) = (
            node
            for node in branch.attributes["then_branch"].as_graph()
            if node.op_type in ("MultiHeadAttention", "Attention")
        )
        added = fused.inputs[-1]
        assert added is None or added.producer().graph is fused.graph


class Mixed(torch.nn.Module):
    """One attention that the fused operator can say, and one that it cannot."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(20, HEADS * DIM)
        self.table = torch.nn.Parameter(torch.randn(BUCKETS, HEADS))

    def forward(self, ids):
        x = self.embedding(ids).unflatten(2, (HEADS, DIM)).transpose(1, 2)
        biased = ops.attention(x, x, x, relative_bias=ops.RelativeBias(self.table, "t5", FURTHEST))
        causal = ops.attention(x, x[:, :KV_HEADS], x[:, :KV_HEADS], causal=True)
        return {"out": biased + causal}


def test_conversion_demands_fused_attention_only_where_it_can_be():
    from fastattn.onnx.convert import convert
    from fastattn.onnx.graph_spec import GraphSpec
    from fastattn.onnx.targets import TARGETS

    ids = torch.randint(0, 20, (2, 5))
    spec = GraphSpec("model", Mixed().eval(), {"ids": ids}, {"ids": ("batch", "sequence")}, ("out",))
    for target, fused in (("cpu", 1), ("standard", 2)):
        found = convert(spec, TARGETS[target]).fusions
        assert found["attention"] == fused and found["packed_attention"] == 0, target
