"""What an export is for: the operators it may hold, what it answers, and what each target refuses."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

import fastattn
from fastattn import ops

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import onnx_ir
import onnxruntime
from batches import assert_same_outputs, token_batch
from conftest import LAYERS
from exported_cases import Exported, assert_close, assert_runtime_knows, in_float64
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from fastattn.onnx import targets
from fastattn.onnx.convert import convert
from fastattn.onnx.fusions import FusionError, check_operators
from fastattn.onnx.graph_spec import GraphSpec
from fastattn.onnx.sources.encoder import prepare
from fastattn.onnx.targets import TARGETS, current_target, using_target


@pytest.fixture(scope="module")
def bert(new_bert):
    return new_bert().eval()


@pytest.fixture(scope="module", params=["web", "standard", "cuda"])
def made(request, bert):
    """A target and the BERT converted for it; what "cpu" makes has tests of its own."""
    return TARGETS[request.param], convert(prepare(bert, None, None).graphs[0], TARGETS[request.param])


def test_every_target_fuses_every_layer(made):
    target, converted = made
    assert converted.fusions == {
        "attention": LAYERS,
        "packed_attention": LAYERS,
        # Where additions are Add, the embeddings' own is one of them.
        "add_layer_norm": 2 * LAYERS + (target.addition == "Add"),
        "bias_gelu": LAYERS,
    }


def test_graphs_hold_what_their_target_has(made):
    target, converted = made
    model = converted.model
    check_operators(model, target)
    assert_runtime_knows(model)
    nodes = list(onnx_ir.traversal.RecursiveGraphIterator(model.graph))
    kinds, domains = Counter(node.op_type for node in nodes), {node.domain for node in nodes}
    assert model.graph.opset_imports[""] == target.opset
    assert {version for node in nodes if not node.domain and (version := node.version)} <= {target.opset}
    if target.name == "standard":
        assert domains == {""} and set(model.opset_imports) == {""}
        # In the loop, and once more for a batch of one.
        assert kinds["Attention"] == 2 * LAYERS and kinds["Loop"] == LAYERS
        onnx.checker.check_model(onnx_ir.to_proto(model), full_check=True)
    else:
        assert domains == {"", "com.microsoft"}
        assert kinds["MultiHeadAttention"] == (1 + target.loops) * LAYERS
    if target.name == "cuda":
        assert kinds["Loop"] == kinds["If"] == kinds["Sum"] == 0
        assert kinds["BiasGelu"] == LAYERS
        # The host is waited for once: for the real tokens, and for their places in the padded batch.
        assert kinds["NonZero"] <= 3 and kinds["Compress"] == 0


BATCHES = {
    "right": ([9, 4, 1], False),
    "left": ([9, 4, 1], True),
    "no padding": ([6, 6, 6], False),
    "a row of padding": ([5, 0, 2], False),
    "nothing but padding": ([0, 0], False),
}


@pytest.mark.parametrize("name", BATCHES)
def test_every_target_answers_as_the_model(name, made, bert):
    """On the CPU provider, which has the operators of all targets."""
    _, converted = made
    lengths, left = BATCHES[name]
    inputs = token_batch(lengths, 9, left=left)
    session = session_of(converted)
    outputs = [value.name for value in session.get_outputs()]
    found = dict(zip(outputs, session.run(None, {k: x.numpy() for k, x in inputs.items()}), strict=True))
    with torch.no_grad():
        expected = bert(**inputs)
    real = inputs["attention_mask"].clone()
    # What the pooler reads of a row of padding is not the model's: nothing may be attended.
    rows = real.any(1)
    for key in outputs:
        assert np.isfinite(found[key]).all(), key
    if rows.any():
        assert_same_outputs(
            {key: torch.from_numpy(found[key])[rows] for key in outputs},
            {key: expected[key][rows] for key in outputs},
            real[rows],
            name,
        )


def session_of(converted):
    content = onnx_ir.to_proto(converted.model).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])


class MultiHeadAttention(OpRun):
    """com.microsoft.MultiHeadAttention as its schema words it, with one key length a sequence, in float64."""

    op_domain = "com.microsoft"

    def _run(
        self, query, key, value, bias, lengths, added=None, num_heads=None, scale=None, mask_filter_value=None
    ):
        assert bias is None and lengths.dtype == np.int32 and lengths.shape == query.shape[:1]
        q, k, v = (
            torch.from_numpy(x).double().unflatten(2, (num_heads, -1)).transpose(1, 2)
            for x in (query, key, value)
        )
        scores = q @ k.mT * scale
        if added is not None:
            assert added.ndim == 4 and added.shape[-2:] == scores.shape[-2:]
            scores = scores + torch.from_numpy(added)
        absent = torch.arange(k.shape[2]) >= torch.from_numpy(lengths)[:, None]
        # The operator's documentation: the value filled in, which leaves a row without keys the mean of all.
        scores = scores.masked_fill(absent[:, None, None], mask_filter_value)
        return ((scores.softmax(-1) @ v).transpose(1, 2).flatten(2).numpy().astype(query.dtype),)


def test_packed_attention_of_cuda_by_the_operators_own_definition():
    """Not by ONNX Runtime's CPU kernel alone: bounds, keys selected from a table, bias, no keys at all."""
    cases = {
        "plain": lambda x: ops.varlen_attention(x["q"], x["k"], x["k"], x["bounds_q"], x["bounds_k"], 9, 9),
        "selected": lambda x: ops.varlen_attention(
            x["q"], *[x["q"].index_select(0, x["rows"])] * 2, x["bounds_q"], x["bounds_k"], 9, 9
        ),
        "alibi": lambda x: ops.varlen_attention(
            x["q"], x["k"], x["k"], x["bounds_q"], x["bounds_k"], 9, 9, alibi_slopes=x["slopes"]
        ),
    }
    inputs = {
        "q": torch.randn(8, 3, 4),
        "k": torch.randn(5, 3, 4),
        "rows": torch.tensor([0, 1, 4, 6, 7]),
        "slopes": torch.rand(3),
        "bounds_q": torch.tensor([0, 3, 4, 8], dtype=torch.int32),
        "bounds_k": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
    }
    dynamic = {name: {} if name == "slopes" else {0: "rows"} for name in inputs}
    exported = Exported(cases, inputs, dynamic, "cuda")
    evaluator = ReferenceEvaluator(onnx_ir.to_proto(exported.model), new_ops=[MultiHeadAttention])
    found = evaluator.run(None, {key: inputs[name].numpy() for key, name in exported.names.items()})
    for case, got in zip(cases, found, strict=True):
        assert_close(torch.from_numpy(got), cases[case](inputs), cases[case](in_float64(inputs)), case)


def test_a_contrib_node_in_a_standard_graph_is_an_error(made, bert, tmp_path, monkeypatch):
    target, converted = made
    if target.name != "standard":
        with pytest.raises(FusionError, match=r"com.microsoft.\w+, which target 'standard' has not"):
            check_operators(converted.model, TARGETS["standard"])
        return
    # Anything that emits one without asking the target is caught before a file is written.
    from fastattn.onnx import graph, translations

    def emitting(x, bias, approximate):
        return graph.emit("BiasGelu", [x, bias], graph.CONTRIB_DOMAIN)

    operator = torch.ops.fastattn.bias_gelu.default
    monkeypatch.setitem(translations.TRANSLATIONS, operator, emitting)
    with pytest.raises(FusionError, match=r"com.microsoft.BiasGelu, which target 'standard' has not"):
        fastattn.export(bert, tmp_path / "out", target="standard", layouts=(), verify=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda x: onnx_ir.node("GatedAdd", [x], domain="com.microsoft"), "GatedAdd"),
        (
            lambda x: onnx_ir.node("GroupQueryAttention", [x], {"causal": 0}, domain="com.microsoft"),
            "GroupQueryAttention.causal",
        ),
        (
            lambda x: onnx_ir.node("GroupQueryAttention", [*[x] * 14, x, x], domain="com.microsoft"),
            "GroupQueryAttention.k_norm_weight",
        ),
    ],
    ids=["operator", "attribute", "input"],
)
def test_web_holds_nothing_that_its_runtime_came_before(make, named):
    value = onnx_ir.Value(name="x", type=onnx_ir.TensorType(onnx_ir.DataType.FLOAT))
    node = make(value)
    graph = onnx_ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 20}, name="graph")
    model = onnx_ir.Model(graph, ir_version=10)
    check_operators(model, TARGETS["cpu"])
    with pytest.raises(FusionError, match=rf"{named}, which the ONNX Runtime of target 'web' does not know"):
        check_operators(model, TARGETS["web"])


def test_names_that_web_lacks_are_names_of_this_runtime():
    """A misspelt name would forbid nothing."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    known = set()
    for schema in get_all_operator_schema():
        if schema.domain == "com.microsoft":
            inputs = [each.name for each in schema.inputs]
            known |= {schema.name, *(f"{schema.name}.{name}" for name in (*schema.attributes, *inputs))}
    assert TARGETS["web"].unknown <= known


class Sorting(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x)[0]


@pytest.mark.parametrize("target", ["cpu", "standard"])
def test_an_operation_without_translation_is_named(target):
    spec = GraphSpec("model", Sorting(), {"x": torch.randn(3, 4)}, {"x": ("batch", 4)}, ("out",))
    with pytest.raises(ValueError, match=r"the model calls aten.linalg_qr.*, which has no ONNX translation"):
        convert(spec, TARGETS[target])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"precisions": ("fp8",)}, r"precisions has \['fp8'\]; they must be of"),
        ({"addition": "Plus"}, "addition is 'Plus'; it must be 'Sum' or 'Add'"),
        ({"contrib": False}, "opset must be at least 23, which has Attention"),
    ],
)
def test_a_target_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TARGETS["cpu"], **changes)


def test_the_current_target_is_that_of_the_context():
    assert current_target() is TARGETS["cpu"]
    with using_target(TARGETS["web"]):
        assert current_target().name == "web"
    assert current_target() is TARGETS["cpu"]
    assert set(targets.PRECISIONS) == {name for each in TARGETS.values() for name in each.precisions}
