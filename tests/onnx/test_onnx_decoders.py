"""Exported decoders: every language model answers as the original, prompt and decoding, cache and all."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import fastattn
from fastattn.onnx.checks.decoder import CachedDecoder, positions_of
from fastattn.onnx.sources import prepare

# The families' cases are those of the registry-driven test.
sys.path[:0] = [str(Path(__file__).parents[1] / "models")]

from family_models import BY_NAME, build  # noqa: E402

pytestmark = pytest.mark.model

TOLERANCE = 1e-4

# Case -> what makes its heads a multiple of 8 wide, which GroupQueryAttention asks for, and what its graph
# holds: layers over a cache, rotary embeddings. One layer, where a second would be of the same kind: others
# have several.
FUSED = {
    "GPT-2": (dict(n_embd=48), 2, 0),
    "GPT-Neo": (dict(hidden_size=48), 2, 0),
    "GPT-J": (dict(n_embd=48, n_layer=1), 1, 2),
    "GPT-NeoX": (dict(num_hidden_layers=1), 1, 2),
    "GPT-NeoX serial": (dict(num_hidden_layers=1), 1, 2),
    "OPT": (dict(hidden_size=48, word_embed_proj_dim=48, num_hidden_layers=1), 1, 0),
    "OPT 350m": (dict(hidden_size=48, num_hidden_layers=1), 1, 0),
    "BLOOM": (dict(hidden_size=48), 2, 0),
    "Falcon 7b": (dict(hidden_size=64, num_hidden_layers=1), 1, 2),
    "Falcon 40b": (dict(hidden_size=64, num_hidden_layers=1), 1, 2),
    "Falcon rw": (dict(hidden_size=64, num_hidden_layers=1), 1, 0),
    "Llama": ({}, 2, 4),
    "Mistral": (dict(head_dim=16, num_hidden_layers=1), 1, 2),
    "Qwen2": ({}, 2, 4),
    "Qwen3": (dict(head_dim=16, num_hidden_layers=1), 1, 2),
    "Gemma 2": (dict(head_dim=16), 3, 6),
    "Gemma 3": (dict(head_dim=16), 3, 6),
    "Phi": (dict(num_hidden_layers=1), 1, 2),
    "gpt-oss": (dict(head_dim=16), 2, 4),
}
# What transformers passes to a layer (masks, angles, caches) reaches these as it does one of the others.
ONCE = (
    "GPT-Neo", "GPT-J", "GPT-NeoX", "GPT-NeoX serial", "OPT 350m", "Falcon 40b", "Falcon rw",
    "Qwen2", "Qwen3", "Phi",
)  # fmt: skip
FAMILIES = [pytest.param(name, marks=[pytest.mark.once] if name in ONCE else []) for name in FUSED]


def language_model(name, **changes):
    case = BY_NAME[name]
    return build(case, case.heads[0], case.reference if case.reference == "sdpa" else None, **changes)


def manifest_of(folder):
    return json.loads((folder / "fastattn.json").read_text())


def session_of(folder):
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 2, 3
    return onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )


def assert_close(found, expected, context):
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"{context}: error {error:.2e} of the scale, {list(expected.shape)}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """`exported(name)`: the model, which is left alone, and the folder of its verified export; made once."""
    made = {}

    def state(model):
        modules = [(name, type(module)) for name, module in model.named_modules()]
        return modules, model.config._attn_implementation, model.config.to_dict()

    def export(name):
        if name not in made:
            model = language_model(name, **FUSED[name][0])
            folder, before = tmp_path_factory.mktemp("decoder"), state(model)
            fastattn.export(model, folder, layouts=())
            assert state(model) == before
            made[name] = model, folder
        return made[name]

    return export


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_exported_fused_and_verified(exported, name):
    """Verification puts it to padding on either side, decoding, chunked prompts and shared buffers."""
    _, folder = exported(name)
    _, layers, rotary = FUSED[name]
    graph = manifest_of(folder)["graphs"]["model"]
    assert graph["fusions"]["cached_attention"] == layers
    assert graph["fusions"]["rotary"] == rotary
    assert manifest_of(folder)["verification"] is not None


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "one_layer"),
    [
        ("GPT-2", dict(n_layer=1)),
        ("Mistral", dict(num_hidden_layers=1)),
        ("BLOOM", dict(n_layer=1)),
    ],
)
def test_heads_the_operator_does_not_take_are_written_plain(tmp_path, name, one_layer):
    """Their sizes in the table are no multiple of 8: right, and said to be unfused."""
    model = language_model(name, **one_layer)
    fastattn.export(model, tmp_path, layouts=())
    assert manifest_of(tmp_path)["graphs"]["model"]["fusions"]["cached_attention"] == 0


@pytest.mark.parametrize("name", ["Llama", "Gemma 2"])
def test_names_and_shapes_are_those_that_loaders_know(exported, name):
    _, folder = exported(name)
    cache = manifest_of(folder)["cache"]
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    inputs = [value.name for value in graph.input]
    layers = range(cache["layers"])
    past = [f"past_key_values.{i}.{kind}" for i in layers for kind in ("key", "value")]
    present = [f"present.{i}.{kind}" for i in layers for kind in ("key", "value")]
    assert inputs[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs[3:] == [*past, "logits_to_keep"]
    assert [value.name for value in graph.output] == ["logits", *present]
    assert "logits_to_keep" in {value.name for value in graph.initializer}
    shapes = {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    heads, width = cache["kv_heads"], cache["key_dim"]
    assert shapes["attention_mask"][1] == "past_sequence + sequence"
    assert shapes[past[0]][1:] == [heads, "past_sequence", width]
    assert shapes[present[0]][1:] == [heads, "past_sequence + sequence", width]
    assert shapes["logits"][-1] == BY_NAME[name].options["vocab_size"]


def test_gpt2_decodes_with_few_nodes_and_stores_its_embedding_once(exported):
    """The tied head is the embedding; all products are Gemms; only views stand around attention."""
    _, folder = exported("GPT-2")
    graph = ir.load(folder / "model.onnx").graph
    kinds = [node.op_type for node in graph]
    embeddings = [x for x in graph.initializers.values() if x.shape == ir.Shape([97, 48])]
    assert len(embeddings) == 1
    assert kinds.count("Gemm") == 4 * 2 + 1
    assert not {"MatMul", "Transpose", "Split"} & set(kinds)
    assert [kinds.count(kind) for kind in ("GroupQueryAttention", "LayerNormalization")] == [2, 5]
    assert len(kinds) < 70


def test_a_left_padded_row_decodes_as_it_does_alone(exported):
    """Keys past a buffer's filled part hold anything; shorter rows do not see their padding."""
    _, folder = exported("Llama")
    session = session_of(folder)
    generator = torch.Generator().manual_seed(3)
    short, long = (torch.randint(4, 97, (1, n), generator=generator) for n in (4, 9))
    together = torch.cat((torch.cat((torch.zeros(1, 5, dtype=torch.int64), short), 1), long))
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :5] = 0
    both, alone = CachedDecoder(session, 2, room=20), CachedDecoder(session, 2)
    found = both.run(together, mask, positions_of(mask), keep=1)
    expected = alone.run(short, mask[:1, 5:], positions_of(mask[:1, 5:]), keep=1)
    for _ in range(4):
        assert_close(found[:1], expected, "a row beside a longer one")
        token = expected.argmax(-1)
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.int64)), 1)
        positions = positions_of(mask)[:, -1:]
        found = both.run(token.expand(2, 1), mask, positions)
        expected = alone.run(token, mask[:1, 5:], positions_of(mask[:1, 5:])[:, -1:])


def test_keys_lie_in_the_cache_as_transformers_keeps_them(exported):
    """So that a cache can be carried over: the same order of heads and positions."""
    model, folder = exported("Qwen2")
    ids = torch.arange(5, 12)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    session = session_of(folder)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)}
    feeds = {name: x.numpy() for name, x in feeds.items()}
    for value in session.get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    found = session.run(["present.0.key", "present.0.value"], feeds)
    assert_close(torch.from_numpy(found[0]), cache.layers[0].keys, "keys")
    assert_close(torch.from_numpy(found[1]), cache.layers[0].values, "values")


@pytest.mark.parametrize("head", ["GPT2Model", "GPT2ForSequenceClassification"])
def test_a_decoder_without_a_language_models_head_is_one_pass(tmp_path, head):
    model = build(BY_NAME["GPT-2"], head, n_layer=1)
    result = fastattn.export(model, tmp_path, layouts=())
    assert result.outputs == (("logits",) if "For" in head else ("last_hidden_state",))
    assert manifest_of(tmp_path)["cache"] is None


def test_with_past_is_the_same_task(tmp_path):
    model = language_model("GPT-2", n_embd=48)
    assert prepare(model, "text-generation-with-past", None).task == "text-generation"
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        fastattn.export(model, tmp_path, task="text-classification", verify=False, layouts=())


def test_angles_that_depend_on_the_whole_run_are_refused_by_name(tmp_path):
    half = [1.0] * 4
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        short_factor=half,
        long_factor=half,
        factor=2.0,
        original_max_position_embeddings=16,
    )
    model = language_model("Llama", rope_parameters=rope)
    with pytest.raises(ValueError, match="longrope"):
        fastattn.export(model, tmp_path, verify=False)
    assert not list(tmp_path.iterdir())
