"""Exported BERTs: the untouched model's answers, fused and padding-free; the user's model stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from batches import assert_same_outputs, token_batch

import fastattn
from fastattn.swap import is_swapped

transformers = pytest.importorskip("transformers")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.model

LAYERS = 2

# Class -> task, and the outputs its ModelOutput has.
HEADS = {
    "BertModel": ("feature-extraction", ("last_hidden_state", "pooler_output")),
    "BertForMaskedLM": ("fill-mask", ("logits",)),
    "BertForSequenceClassification": ("text-classification", ("logits",)),
    "BertForTokenClassification": ("token-classification", ("logits",)),
    "BertForQuestionAnswering": ("question-answering", ("start_logits", "end_logits")),
    "BertForMultipleChoice": ("multiple-choice", ("logits",)),
    "BertForNextSentencePrediction": ("next-sentence-prediction", ("logits",)),
    "BertForPreTraining": ("pretraining", ("prediction_logits", "seq_relationship_logits")),
}

SHAPES = {
    "right padding": ([9, 4, 1], 9, False),
    "left padding": ([9, 4, 1], 9, True),
    "no padding": ([6, 6], 6, False),
    "batch == length": ([3, 1, 2], 3, False),
    "one token": ([1], 1, False),
    "one padded row": ([5], 12, True),
    "the longest": ([64, 2], 64, False),
    "many short": ([1, 2, 1, 2, 1, 2, 1, 2, 1], 2, True),
}


def run(model, batch):
    with torch.no_grad():
        return model(**batch)


@pytest.mark.parametrize(
    "class_name",
    [
        pytest.param(name, marks=[] if name in ("BertModel", "BertForPreTraining") else [pytest.mark.once])
        for name in HEADS
    ],
)
def test_every_head(class_name, new_bert, tmp_path):
    task, outputs = HEADS[class_name]
    model = new_bert(class_name, num_hidden_layers=1)
    result = fastattn.export(model, tmp_path / "out")
    assert (result.task, result.outputs) == (task, outputs)
    assert result.verification.passed
    assert result.fusions == {
        "attention": 1,
        "packed_attention": 1,
        "add_layer_norm": 2,
        # The language modelling head has a GELU of its own.
        "bias_gelu": 1 + (class_name in ("BertForMaskedLM", "BertForPreTraining")),
    }
    loaded = fastattn.load(tmp_path / "out")
    choices = 3 if class_name == "BertForMultipleChoice" else None
    for name, (lengths, width, left) in SHAPES.items():
        batch = token_batch(lengths, width, left, choices=choices)
        assert_same_outputs(loaded(**batch), run(model.eval(), batch), batch["attention_mask"], name)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_padding(name, exported, exported_model):
    lengths, width, left = SHAPES[name]
    batch = token_batch(lengths, width, left)
    assert_same_outputs(exported_model(**batch), run(exported[0], batch), batch["attention_mask"], name)


def test_many_shapes_in_one_session(exported, exported_model):
    for seed in range(30):
        torch.manual_seed(seed)
        rows, width = int(torch.randint(1, 7, ())), int(torch.randint(1, 40, ()))
        lengths = torch.randint(1, width + 1, (rows,)).tolist()
        batch = token_batch(lengths, width, left=bool(seed % 2), seed=seed)
        context = f"seed {seed}, lengths {lengths} of {width}"
        assert_same_outputs(
            exported_model(**batch), run(exported[0], batch), batch["attention_mask"], context
        )


def test_mask_with_holes(exported, exported_model):
    """Padding between tokens, as some collators leave it, and hidden first tokens."""
    torch.manual_seed(3)
    batch = token_batch([11, 11, 11], 11)
    batch["attention_mask"] = (torch.rand(3, 11) > 0.4).long()
    batch["attention_mask"][0, 0], batch["attention_mask"][1, 0] = 0, 1
    assert_same_outputs(exported_model(**batch), run(exported[0], batch), batch["attention_mask"])


def test_row_of_padding_is_finite_and_changes_nothing(exported_model):
    batch = token_batch([9, 4, 6], 9)
    batch["attention_mask"][1] = 0
    beside = exported_model(**batch)
    alone = exported_model(**{name: x[[0, 2]] for name, x in batch.items()})
    for name, value in beside.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value[[0, 2]], alone[name])
    batch["attention_mask"][:] = 0
    assert all(torch.isfinite(value).all() for value in exported_model(**batch).values())


@pytest.mark.once
@pytest.mark.parametrize("activation", ["gelu_new", "relu"])
def test_other_activations(activation, new_bert, tmp_path):
    model = new_bert(hidden_act=activation, num_hidden_layers=1)
    result = fastattn.export(model, tmp_path / "out")
    assert result.fusions.get("bias_gelu", 0) == (activation == "gelu_new")
    assert result.fusions["packed_attention"] == 1


@pytest.mark.once
def test_example_inputs_may_be_the_callers(new_bert, tmp_path):
    """Also a model without a pooler has one output fewer."""
    model = transformers.BertModel(new_bert(num_hidden_layers=1).config, add_pooling_layer=False)
    result = fastattn.export(model, tmp_path / "out", example_inputs=token_batch([3, 7], 7))
    assert result.outputs == ("last_hidden_state",)


def test_padded_model_is_exported_padded(new_bert, tmp_path):
    """A swapped model is exported as it is."""
    model = new_bert(num_hidden_layers=1)
    fastattn.optimize(model, padding="padded")
    result = fastattn.export(model, tmp_path / "out")
    assert result.fusions["attention"] == 1
    assert result.fusions.get("packed_attention", 0) == 0
    batch = token_batch([9, 4, 1], 9, left=True)
    found = fastattn.load(tmp_path / "out")(**batch)
    fastattn.restore(model)
    assert_same_outputs(found, run(model.eval(), batch), batch["attention_mask"])


def test_partly_swapped_model(new_bert, tmp_path):
    model = new_bert()
    fastattn.optimize(model, exclude=["encoder.layer.1.attention.self"])
    result = fastattn.export(model, tmp_path / "out")
    assert result.verification.passed
    assert result.fusions["add_layer_norm"] == 2 * LAYERS


@pytest.mark.once
def test_half_precision_model(new_bert, tmp_path):
    model = new_bert("BertForSequenceClassification", num_hidden_layers=1).bfloat16()
    assert fastattn.export(model, tmp_path / "out").verification.passed
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch = token_batch([9, 4], 9)
    expected = run(copy.deepcopy(model).float().eval(), batch)
    assert_same_outputs(fastattn.load(tmp_path / "out")(**batch), expected, batch["attention_mask"])


def state(model):
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.data_ptr(), p.requires_grad, p.grad) for name, p in model.named_parameters()],
        [sorted(module.__dict__) for module in model.modules()],
        [id(module.__dict__.get("config")) for module in model.modules()],
        copy.deepcopy(model.config.__dict__),
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_user_model_is_untouched(swapped, new_bert, tmp_path):
    model = new_bert(num_hidden_layers=1)
    model.config.return_dict = False
    if swapped:
        fastattn.optimize(model)
    model.encoder.layer[0].eval()
    before, generator = state(model), torch.get_rng_state()
    fastattn.export(model, tmp_path / "out")
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), generator)
    assert is_swapped(model) is swapped


@pytest.mark.once
def test_minilm_on_sentences(minilm, tmp_path):
    model, tokenizer = minilm
    result = fastattn.export(model, tmp_path / "out", tokenizer=tokenizer)
    assert result.fusions == {"attention": 6, "packed_attention": 6, "add_layer_norm": 12, "bias_gelu": 6}
    assert result.verification.worst.error <= 1e-4
    sentences = [
        "A man is playing a guitar.",
        "Rain.",
        "The committee met on Tuesday to discuss the new budget.",
    ]
    for side in ("right", "left"):
        again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", padding_side=side)
        batch = dict(again(sentences, padding=True, return_tensors="pt"))
        found, expected = fastattn.load(tmp_path / "out")(**batch), run(model.eval(), batch)
        assert_same_outputs(found, expected, batch["attention_mask"], side)


def test_what_the_folder_holds(exported):
    _, folder = exported
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert {"config.json", "fastattn.json", "model.onnx"} <= set(files)
    assert not list(folder.parent.glob(".fastattn*"))
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    assert "fastattn" not in json.dumps(config)
    assert transformers.AutoConfig.from_pretrained(folder).num_hidden_layers == LAYERS
    manifest = json.loads((folder / "fastattn.json").read_text())
    assert sorted({*manifest["files"], "fastattn.json"}) == files
    assert manifest["opsets"] == {"ai.onnx": 20, "com.microsoft": 1}
    assert manifest["graphs"]["model"]["fusions"]["packed_attention"] == LAYERS
    model = onnx.load(folder / "model.onnx")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 20, "com.microsoft": 1}
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["fastattn.task"] == "feature-extraction"
    assert (model.producer_name, model.producer_version) == ("fastattn", fastattn.__version__)
    for value in [*model.graph.input, *model.graph.output]:
        named = [dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
        assert named[0] == "batch", value.name
    assert [value.name for value in model.graph.output] == ["last_hidden_state", "pooler_output"]


def test_graph_copies_nothing_around_packed_attention(exported):
    """No transposition of activations, and keys are selected inside the loop: what the rewrites are for."""
    model = onnx.load(exported[1] / "model.onnx")
    kinds = [node.op_type for node in model.graph.node]
    loops = [
        node.op_type
        for choice in model.graph.node
        if choice.op_type == "If"
        for branch in choice.attribute
        for node in branch.g.node
    ]
    assert loops.count("Loop") == LAYERS
    assert kinds.count("Gemm") == 6 * LAYERS + 1
    assert kinds.count("MatMul") == kinds.count("Add") - 2 == 0, "two Adds make the embeddings"
    assert kinds.count("Transpose") <= 4, "only of indices and masks"


@pytest.mark.once
def test_tied_embedding_is_stored_once(new_bert, tmp_path):
    model = new_bert("BertForMaskedLM", vocab_size=20_000, num_hidden_layers=1)
    result = fastattn.export(model, tmp_path / "out", verify=False)
    assert result.size_bytes < 1.1 * sum(p.numel() * 4 for p in model.parameters())
