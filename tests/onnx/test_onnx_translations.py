"""Every operation's ONNX subgraph, in ONNX Runtime, against the operation in float64, at other shapes."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch

from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from exported_cases import Exported, assert_close, in_float64

HEADS, KV_HEADS, DIM, VALUE_DIM = 4, 2, 8, 6


def test_every_operation_has_an_onnx_face():
    """A backward is not part of inference; nothing else is left out."""
    from fastattn.onnx.translations import TRANSLATIONS

    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastattn::")}
    translated = {operator._schema.name for operator in TRANSLATIONS} & registered
    assert len(translated) >= 14
    assert {name for name in registered - translated if not name.endswith("_backward")} == set()


def flags(lse=False, **arguments):
    """A call of `ops.attention`; a str among the arguments names an input, `key` and `value` too."""
    key, value = arguments.pop("key", "key"), arguments.pop("value", "value")

    def call(x):
        named = {name: x[v] if isinstance(v, str) else v for name, v in arguments.items()}
        return ops.attention(x["query"], x[key], x[value], return_lse=lse, **named)

    return call


DENSE = {
    "plain": flags(),
    "scale": flags(scale=0.7),
    "padding mask": flags(mask="mask"),
    "mask of four dimensions": flags(mask="mask4"),
    "mask over queries of one head": flags(mask="mask_rows"),
    "padding mask of four dimensions": flags(mask="mask_keys"),
    "bias": flags(bias="bias"),
    "bias that hides whole rows": flags(bias="hiding_bias"),
    "mask and bias": flags(mask="mask", bias="bias"),
    "causal": flags(causal=True),
    "causal from 0": flags(causal=True, query_start=0),
    "causal, rows before every key": flags(causal=True, query_start=-2),
    "causal from each row's own start": flags(causal=True, query_start="starts"),
    "causal under a mask": flags(causal=True, mask="mask"),
    "key lengths": flags(key_lengths="lengths"),
    "key lengths, causal": flags(key_lengths="lengths", causal=True, query_start="starts"),
    "garbage past the key lengths": flags(key="broken_key", value="broken_value", key_lengths="lengths"),
    "grouped heads": flags(key="few_keys", value="few_values"),
    "grouped heads under a mask": flags(key="few_keys", value="few_values", mask="mask4"),
    "wider values": flags(value="wide_value"),
    "wider values under a mask": flags(value="wide_value", mask="mask"),
    "logsumexp": flags(lse=True),
    "logsumexp of rows that see nothing": flags(lse=True, mask="mask", causal=True, query_start=-1),
}


def dense_inputs(batch, queries, keys):
    lengths = torch.randint(0, keys + 1, (batch,))
    absent = torch.arange(keys) >= lengths[:, None]
    mask = torch.rand(batch, keys) > 0.4
    mask[0] = False
    hiding = torch.randn(1, HEADS, queries, keys)
    hiding[:, :, 0] = -torch.inf
    inputs = {
        "query": torch.randn(batch, queries, HEADS, DIM).transpose(1, 2),
        "key": torch.randn(batch, HEADS, keys, DIM),
        "value": torch.randn(batch, HEADS, keys, DIM),
        "wide_value": torch.randn(batch, HEADS, keys, VALUE_DIM),
        "few_keys": torch.randn(batch, KV_HEADS, keys, DIM),
        "few_values": torch.randn(batch, KV_HEADS, keys, VALUE_DIM),
        "mask": mask,
        "mask4": torch.rand(batch, HEADS, queries, keys) > 0.4,
        "mask_rows": torch.rand(1, 1, queries, keys) > 0.4,
        "mask_keys": mask.clone()[:, None, None, :],
        "bias": torch.randn(batch, 1, queries, keys),
        "hiding_bias": hiding,
        "lengths": lengths,
        "starts": torch.randint(-1, keys, (batch,)),
    }
    for name in ("key", "value"):
        inputs[f"broken_{name}"] = inputs[name].masked_fill(absent[:, None, :, None], torch.nan)
    return inputs


@functools.cache
def export_dense(target):
    sizes = {"batch": 3, "queries": 5, "keys": 7}
    inputs = dense_inputs(**sizes)
    dynamic = {
        name: {i: "dynamic" for i, size in enumerate(x.shape) if size in (3, 5, 7)}
        for name, x in inputs.items()
    }
    return Exported(DENSE, inputs, dynamic, target)


@pytest.fixture(scope="module", params=["cpu", "standard"])
def dense(request):
    return export_dense(request.param)


@pytest.fixture(scope="module", params=[(3, 5, 7), (2, 9, 9), (1, 1, 12), (4, 1, 1)], ids=str)
def dense_results(request, dense):
    torch.manual_seed(1)
    inputs = dense_inputs(*request.param)
    return request.param, inputs, dense.run(inputs)


@pytest.mark.parametrize("name", DENSE)
def test_attention(name, dense_results):
    shape, inputs, results = dense_results
    exact, own = DENSE[name](in_float64(inputs)), DENSE[name](inputs)
    exact, own = (x if isinstance(x, tuple) else (x,) for x in (exact, own))
    for found, mine, wanted in zip(results[name], own, exact, strict=True):
        assert_close(found, mine, wanted, (name, shape))


def test_attention_is_fused_where_the_operator_can_say_it(dense):
    """MultiHeadAttention: plain, scaled, under a padding mask of two or four dimensions, wider values.

    Attention: all but a bias and the logsumexp.
    """
    kinds = Counter(node.op_type for node in dense.model.graph)
    if dense.target == "cpu":
        assert kinds["MultiHeadAttention"] == 6
    else:
        assert kinds["Attention"] == len(DENSE) - 5 and "MultiHeadAttention" not in kinds


def varlen(lse=False, key="key", value="value", bounds="bounds_k", **arguments):
    def call(x):
        named = {name: x[v] if isinstance(v, str) else v for name, v in arguments.items()}
        return ops.varlen_attention(
            x["query"], x[key], x[value], x["bounds_q"], x[bounds], 64, 64, return_lse=lse, **named
        )

    return call


def over_selected_keys(x):
    """Keys that are rows of the queries' own table, as in a left-padded batch."""
    key, value = (x[name].index_select(0, x["rows"]) for name in ("table", "table_values"))
    return ops.varlen_attention(x["query"], key, value, x["bounds_q"], x["bounds_k"], 64, 64)


VARLEN = {
    "plain": varlen(),
    "scale": varlen(scale=0.7),
    "wider values": varlen(value="wide_value"),
    "grouped heads": varlen(key="few_keys", value="few_values"),
    "causal": varlen(causal=True),
    "causal from 0": varlen(causal=True, query_start=0),
    "causal from each sequence's own start": varlen(causal=True, query_start="starts"),
    "logsumexp": varlen(lse=True),
    "selected keys": over_selected_keys,
}

LENGTHS = [
    ([3, 2, 6], [4, 2, 5]),
    ([5], [9]),
    ([1, 1, 1, 1], [1, 3, 1, 2]),
    ([0, 3, 2, 1], [2, 0, 4, 0]),
    ([2, 1], [0, 0]),
    ([0, 0], [3, 1]),
]


def varlen_inputs(lengths_q, lengths_k):
    queries, keys = sum(lengths_q), sum(lengths_k)
    bounds = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    ]
    return {
        "query": torch.randn(queries, HEADS, DIM),
        "key": torch.randn(keys, HEADS, DIM),
        "value": torch.randn(keys, HEADS, DIM),
        "wide_value": torch.randn(keys, HEADS, VALUE_DIM),
        "few_keys": torch.randn(keys, KV_HEADS, DIM),
        "few_values": torch.randn(keys, KV_HEADS, VALUE_DIM),
        "table": torch.randn(keys + 3, HEADS, DIM),
        "table_values": torch.randn(keys + 3, HEADS, DIM),
        "rows": torch.randperm(keys + 3)[:keys],
        "bounds_q": bounds[0],
        "bounds_k": bounds[1],
        "starts": torch.randint(-1, 4, (len(lengths_q),)),
    }


@functools.cache
def export_packed(target):
    inputs = varlen_inputs(*LENGTHS[0])
    return Exported(VARLEN, inputs, {name: {0: "dynamic"} for name in inputs}, target)


@pytest.fixture(scope="module", params=["cpu", "standard", "cuda"])
def packed(request):
    return export_packed(request.param)


@pytest.fixture(scope="module", params=LENGTHS, ids=str)
def packed_results(request, packed):
    torch.manual_seed(1)
    inputs = varlen_inputs(*request.param)
    return request.param, inputs, packed.run(inputs)


@pytest.mark.parametrize("name", VARLEN)
def test_varlen_attention(name, packed_results):
    lengths, inputs, results = packed_results
    exact, own = VARLEN[name](in_float64(inputs)), VARLEN[name](inputs)
    exact, own = (x if isinstance(x, tuple) else (x,) for x in (exact, own))
    for found, mine, wanted in zip(results[name], own, exact, strict=True):
        assert_close(found, mine, wanted, (name, lengths))


def test_packed_attention_loops_over_the_sequences_and_selects_keys_itself(packed):
    """Nothing is padded on the hot path, and a table of keys is read in place; on a GPU nothing loops."""
    import onnx_ir as ir

    nodes = list(ir.traversal.RecursiveGraphIterator(packed.model.graph))
    loops = [node for node in nodes if node.op_type == "Loop"]
    if packed.target == "cuda":
        fused = [node for node in packed.model.graph if node.op_type == "MultiHeadAttention"]
        assert len(fused) == 4 and not loops
        assert all(len(node.inputs[4].shape) == 1 for node in fused), "how many keys, not which"
        return
    # Only the logsumexp is beyond ai.onnx's operator.
    count = {"cpu": 4, "standard": len(VARLEN) - 1}[packed.target]
    assert len(loops) == count
    inside = []
    for loop in loops:
        (branch,) = (n for n in loop.attributes["body"].as_graph() if n.op_type == "If")
        inside.append(Counter(node.op_type for node in branch.attributes["then_branch"].as_graph()))
    assert all(each["MultiHeadAttention"] + each["Attention"] == 1 for each in inside)
    assert inside[-1]["Gather"] == 2
    alone = Counter(node.op_type for node in nodes if node.graph.name == "one_sequence")
    assert alone["MultiHeadAttention"] + alone["Attention"] == count and not alone["Slice"], "read in place"


WIDTH = 12
WEIGHTS = {
    name: torch.randn(WIDTH, generator=torch.Generator().manual_seed(3)) for name in ("weight", "bias")
}
MATRICES = [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) for n in (WIDTH, 5, 7)]
VECTORS = [torch.randn(n, generator=torch.Generator().manual_seed(n + 50)) for n in (WIDTH, 5, 7)]


def constants(x, tensors):
    """Weights in the dtype of the input, so that the float64 reference is float64 throughout."""
    return [None if t is None else t.to(x.dtype) for t in tensors]


def add_norm(weight=True, bias=True, name="x"):
    def call(x):
        w, b = constants(x[name], [WEIGHTS["weight"] if weight else None, WEIGHTS["bias"] if bias else None])
        return ops.add_layer_norm(x[name], x[f"{name}_residual"], w, b, 1e-5)

    return call


def gelu_of_product(x, approximate="none", name="x"):
    matrix, vector = constants(x[name], [MATRICES[0], VECTORS[0]])
    return ops.bias_gelu(torch.nn.functional.linear(x[name], matrix), vector, approximate)


def packed_products(x, biases=True, name="x"):
    matrices = constants(x[name], MATRICES)
    vectors = constants(x[name], VECTORS) if biases else [None] * 3
    return ops.packed_linear(x[name], matrices, vectors)


POINTWISE = {
    "add_layer_norm": add_norm(),
    "add_layer_norm without bias": add_norm(bias=False),
    "add_layer_norm without weight": add_norm(weight=False, bias=False),
    "add_layer_norm of rows": add_norm(name="rows"),
    "bias_gelu": lambda x: ops.bias_gelu(x["x"], *constants(x["x"], [WEIGHTS["bias"]])),
    "bias_gelu, tanh": lambda x: ops.bias_gelu(x["x"], *constants(x["x"], [WEIGHTS["bias"]]), "tanh"),
    "bias_gelu of a product": gelu_of_product,
    "bias_gelu of a product, tanh": lambda x: gelu_of_product(x, "tanh"),
    "bias_gelu of a product of rows": lambda x: gelu_of_product(x, name="rows"),
    "bias_gelu of one packed sequence": lambda x: gelu_of_product({"x": x["rows"][None]}),
    "packed_linear": packed_products,
    "packed_linear without biases": lambda x: packed_products(x, biases=False),
    "packed_linear of rows": lambda x: packed_products(x, name="rows"),
    "packed_linear of one packed sequence": lambda x: packed_products({"x": x["rows"][None]}),
    "linear without a leading dimension": lambda x: torch.nn.functional.linear(
        x["rows"][0], *constants(x["rows"], [MATRICES[1], VECTORS[1]])
    ),
    "select the only row": lambda x: x["rows"][None][0],
    "index_copy along the rows": lambda x: x["x"][0].index_copy(0, x["places"], x["rows"][:2]),
    "index_copy along the columns": lambda x: x["x"][0].T.index_copy(1, x["places"], x["rows"][:2].T),
}


def pointwise_inputs(batch, length):
    return {
        "x": torch.randn(batch, length, WIDTH),
        "x_residual": torch.randn(batch, length, WIDTH),
        "rows": torch.randn(batch * length, WIDTH),
        "rows_residual": torch.randn(batch * length, WIDTH),
        "places": torch.tensor([length - 1, 0]),
    }


@functools.cache
def export_pointwise(target):
    inputs = pointwise_inputs(3, 5)
    dynamic = {name: {i: "dynamic" for i in range(x.dim() - 1)} for name, x in inputs.items()}
    return Exported(POINTWISE, inputs, dynamic, target)


@pytest.fixture(scope="module", params=["cpu", "standard", "cuda"])
def pointwise(request):
    return export_pointwise(request.param)


@pytest.fixture(scope="module", params=[(3, 5), (1, 2), (6, 9)], ids=str)
def pointwise_results(request, pointwise):
    torch.manual_seed(1)
    inputs = pointwise_inputs(*request.param)
    return request.param, inputs, pointwise.run(inputs)


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_and_linear(name, pointwise_results):
    shape, inputs, results = pointwise_results
    exact, own = POINTWISE[name](in_float64(inputs)), POINTWISE[name](inputs)
    exact, own = (x if isinstance(x, (tuple, list)) else (x,) for x in (exact, own))
    for found, mine, wanted in zip(results[name], own, exact, strict=True):
        assert_close(found, mine, wanted, (name, shape))


def test_biases_move_into_products_and_residuals_escape_the_slow_fusion(pointwise):
    from fastattn.onnx.fusions import count_fusions
    from fastattn.onnx.targets import TARGETS, using_target

    with using_target(TARGETS[pointwise.target]):
        found = count_fusions(pointwise.model)
    kinds = Counter(node.op_type for node in pointwise.model.graph)
    assert found["add_layer_norm"] == 4
    if pointwise.target == "cuda":
        # Every bias stays with its GELU, and ONNX Runtime fuses the additions where it runs on a GPU.
        assert found["bias_gelu"] == 6 and kinds["BiasGelu"] == 4 and kinds["FastGelu"] == 2
        assert kinds["Add"] == 2 and kinds["Sum"] == 0, "one for all norms of the same two tensors"
        return
    assert found["bias_gelu"] == 4
    assert kinds["Add"] == 1, (
        "only the GELUs that follow no product add their bias apart, and they share the sum"
    )
    assert kinds["FastGelu"] == (2 if pointwise.target == "cpu" else 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: ops.add_layer_norm(x["rows"], x["rows_residual"], None, None, 1e-5, dropout_p=0.1)[0],
        lambda x: ops.attention(*[x["x"][:, None]] * 3, dropout_p=0.5),
    ],
    ids=["add_layer_norm", "attention"],
)
def test_dropout_cannot_be_exported(call):
    inputs = pointwise_inputs(3, 5)
    with pytest.raises(ValueError, match=r"dropout_p=0\.[15].*eval mode"):
        Exported({"dropout": call}, inputs, {name: {} for name in inputs})
