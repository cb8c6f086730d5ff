"""Exported encoder-decoders: two graphs that other loaders can drive, verified, the original's tokens.

python -m pytest tests/onnx/test_onnx_encoder_decoders.py -k T5
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from encoder_decoder_models import FAMILIES, Graphs, Session, layers_of, new_model, sources
from torch import Tensor

import fastattn

pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.model

TOLERANCE = 1e-4
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """`exports(family)`: the untouched model, its export's result and graphs; each made and verified once."""
    made = {}

    def export(name):
        if name not in made:
            model = new_model(name)
            folder = tmp_path_factory.mktemp("export")
            made[name] = model, fastattn.export(model, folder), Graphs(folder)
        return made[name]

    return export


# mBART and Pegasus are BART's layers with the norms first, T5 v1.1 is T5's with another MLP.
ONCE = ("T5 v1.1", "mBART", "Pegasus")


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.once] if name in ONCE else []) for name in FAMILIES],
    ids=lambda name: name.replace(" ", "-"),
)
def exported(request, exports):
    return exports(request.param)


def assert_close(found: Tensor, expected: Tensor, context: str = "") -> None:
    assert found.shape == expected.shape, f"{context}: {list(found.shape)}, expected {list(expected.shape)}"
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= TOLERANCE, f"{context}: error {error:.2e} of the scale"


@torch.no_grad()
def test_greedy_tokens(exported):
    """Of ragged sources, padded on either side and with holes, and of one row: transformers' own tokens."""
    model, _, graphs = exported
    for kind in ("right", "left", "holes", "none", "one"):
        inputs = sources(model, kind)
        expected = model.generate(
            **inputs,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            return_dict_in_generate=True,
            output_logits=True,
        )
        tokens, logits = graphs.greedy(inputs, model.generation_config.decoder_start_token_id, NEW_TOKENS)
        wanted = expected.sequences
        # Whisper's generate leaves out the first token.
        assert torch.equal(tokens[:, -wanted.shape[1] :], wanted), kind
        assert_close(logits, torch.stack(expected.logits, dim=1), kind)


@torch.no_grad()
@pytest.mark.parametrize("name", ["T5", "BART"])
def test_beams(exports, name):
    """Caches repeated for beams and reordered between steps give what the original's reordered cache does."""
    model, _, graphs = exports(name)
    inputs = {key: x.repeat_interleave(2, dim=0) for key, x in sources(model, "right").items()}
    mask = inputs["attention_mask"]
    states = graphs.encode(inputs)
    tokens = torch.arange(4, 10)[:, None]
    logits, feeds = graphs.step(graphs.first(states, mask), tokens)
    original = {"encoder_outputs": (states,), "attention_mask": mask, "use_cache": True}
    expected = model(**original, decoder_input_ids=tokens)
    assert_close(logits, expected.logits)
    for order in ([1, 1, 2, 3, 5, 4], [0, 0, 3, 2, 4, 4]):
        rows = torch.tensor(order)
        feeds |= {key: x[order] for key, x in feeds.items() if ".decoder." in key}
        expected.past_key_values.reorder_cache(rows)
        tokens = tokens[rows] + 5
        logits, feeds = graphs.step(feeds, tokens)
        expected = model(**original, decoder_input_ids=tokens, past_key_values=expected.past_key_values)
        assert_close(logits, expected.logits, str(order))


def test_names_and_shapes(exported):
    """Those of optimum and transformers.js, in their order."""
    model, result, graphs = exported
    speech = model.config.model_type == "whisper"
    kinds = [
        f"{index}.{side}.{kind}"
        for index in range(layers_of(model))
        for side in ("decoder", "encoder")
        for kind in ("key", "value")
    ]
    encoder = [value.name for value in graphs.encoder.onnx.get_inputs()]
    inputs = graphs.decoder.onnx.get_inputs()
    assert encoder == (["input_features"] if speech else ["input_ids", "attention_mask"])
    assert [value.name for value in inputs] == [
        *([] if speech else ["encoder_attention_mask"]),
        "input_ids",
        "encoder_hidden_states",
        *(f"past_key_values.{each}" for each in kinds),
        "use_cache_branch",
    ]
    assert [value.name for value in graphs.decoder.onnx.get_overridable_initializers()] == ["logits_to_keep"]
    assert graphs.decoder.outputs == ["logits", *(f"present.{each}" for each in kinds)]
    heads, size = (
        (getattr(model.config, name) for name in ("num_heads", "d_kv"))
        if hasattr(model.config, "d_kv")
        else (3, 16)
    )
    shapes = {value.name: value.shape for value in inputs}
    assert shapes["past_key_values.0.decoder.key"] == ["batch_size", heads, "past_sequence", size]
    assert shapes["past_key_values.0.encoder.value"] == ["batch_size", heads, "encoder_sequence_out", size]
    assert shapes["input_ids"] == ["batch_size", "sequence"]
    assert shapes["encoder_hidden_states"] == ["batch_size", "encoder_sequence", model.config.d_model]
    assert result.task == ("automatic-speech-recognition" if speech else "text2text-generation")
    assert {"config.json", "generation_config.json", "encoder_model.onnx"} <= set(result.files)


def test_fusions(exported):
    """Cross-attention is one fused node a layer, over keys as they lie in the cache; so is self-attention
    where ONNX Runtime's kernel takes the head size; only projections of cross-attention are inside the If.
    """
    import onnx

    model, result, _ = exported
    graph = onnx.load(str(result.folder / "decoder_model_merged.onnx")).graph
    types = [node.op_type for node in graph.node]
    kernel, layers = getattr(model.config, "d_kv", 16) % 8 == 0, layers_of(model)
    assert types.count("MultiHeadAttention") == layers
    assert types.count("GroupQueryAttention") == (layers if kernel else 0)
    (choice,) = (node for node in graph.node if node.op_type == "If")
    branches = {attribute.name: attribute.g for attribute in choice.attribute}
    inside = [node.op_type for node in branches["else_branch"].node]
    assert inside.count("Gemm") == 2 * layers
    assert set(inside) <= {"Gemm", "Reshape", "Transpose", "Identity", "Concat", "Shape"}
    assert {node.op_type for node in branches["then_branch"].node} == {"Identity"}
    # Hidden states stay rows from product to product: only attention wants another shape.
    if kernel:
        assert types.count("Reshape") <= 6 * layers + 8
    # Keys and values are not moved to be attended.
    cross = next(node for node in graph.node if node.op_type == "MultiHeadAttention")
    assert list(cross.input[1:3]) == ["present.0.encoder.key", "present.0.encoder.value"]
    names = [initializer.name for initializer in graph.initializer]
    assert len(names) == len(set(names))


@torch.no_grad()
def test_cross_keys_come_from_the_cache(exported):
    """Once they are there the encoder's output is not read, nor are the caches before."""
    model, _, graphs = exported
    inputs = sources(model, "right")
    states = graphs.encode(inputs)
    start = torch.tensor([[3], [5], [6]])
    plain, after = graphs.step(graphs.first(states, inputs.get("attention_mask")), start)
    dummies = graphs.first(states, inputs.get("attention_mask"), dummy_length=5)
    assert_close(graphs.step(dummies, start)[0], plain)
    expected, _ = graphs.step(after, start + 1)
    after["encoder_hidden_states"] = torch.full_like(states, torch.nan)
    assert torch.equal(graphs.step(after, start + 1)[0], expected)


@torch.no_grad()
def test_logits_to_keep(exported):
    """The logits of as many of the last positions as asked for; of all without a word."""
    model, _, graphs = exported
    inputs = sources(model, "none")
    feeds = graphs.first(graphs.encode(inputs), inputs.get("attention_mask"))
    tokens = torch.arange(4, 14).view(2, 5)
    every, _ = graphs.step(feeds, tokens)
    assert every.shape[1] == 5
    for count in (1, 3, 5, 9):
        last, _ = graphs.step(feeds, tokens, logits_to_keep=np.array([count]))
        assert_close(last, every[:, -count:], str(count))


@torch.no_grad()
@pytest.mark.parametrize("name", ["T5", "Marian"])
def test_verification_sees_a_lost_mask(exports, name):
    """The comparison that ran would have failed, had the encoder's padding been attended."""
    from fastattn.onnx.checks import encoder_decoder
    from fastattn.onnx.sources.encoder_decoder import prepare

    model, result, graphs = exports(name)
    source = prepare(model, None, None)

    def encode(**inputs: Tensor) -> Mapping[str, Tensor]:
        return {"last_hidden_state": graphs.encode(inputs)}

    def decode(**inputs: Tensor) -> Mapping[str, Tensor]:
        mask = torch.ones_like(inputs["encoder_attention_mask"])
        return graphs.decoder.run({**inputs, "encoder_attention_mask": mask})

    assert result.verification is not None and result.verification.passed
    failed = [each for each in encoder_decoder.results(encode, decode, source) if not each.passed]
    assert any("right padding, prompt" in each.case for each in failed)
    assert any("left padding, token" in each.case for each in failed)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "model_class", "outputs"),
    [
        pytest.param(
            "T5", "T5Model", ("last_hidden_state", "encoder_last_hidden_state"), marks=pytest.mark.once
        ),
        ("BART", "BartForQuestionAnswering", ("start_logits", "end_logits", "encoder_last_hidden_state")),
        pytest.param(
            "mBART",
            "MBartForSequenceClassification",
            ("logits", "encoder_last_hidden_state"),
            marks=pytest.mark.once,
        ),
    ],
)
def test_answers_in_one_pass(tmp_path, name, model_class, outputs):
    """Without a language model's head there is one graph and no cache; one row and ragged ones."""
    model = new_model(name, model_class)
    result = fastattn.export(model, tmp_path, verify=False)
    assert result.outputs == outputs
    assert sorted(tmp_path.glob("*.onnx")) == [tmp_path / "model.onnx"]
    graph = Session(tmp_path / "model.onnx")
    for kind in ("right", "left", "one"):
        inputs = sources(model, kind)
        # One end of sequence in every row: its head reads the state there.
        inputs["input_ids"][:, -1] = model.config.eos_token_id
        inputs["attention_mask"][:, -1] = 1
        if model_class == "T5Model":
            inputs["decoder_input_ids"] = inputs["input_ids"][:, :1].expand(-1, 4) + torch.arange(4)
        expected = model(**inputs, use_cache=False)
        found = graph.run(inputs)
        for output in outputs:
            value, wanted = found[output], expected[output]
            if output.startswith("encoder"):
                real = inputs["attention_mask"].bool()
                value, wanted = value[real], wanted[real]
            assert_close(value, wanted, f"{output}, {kind}")


def test_a_swapped_model_is_left_alone(exports):
    """A model that is already optimized exports, and is the same model afterwards."""
    model, _, graphs = exports("BART")
    swapped = new_model("BART")
    fastattn.optimize(swapped)
    config = swapped.config.to_dict()
    hooks = len(swapped.lm_head._forward_pre_hooks)
    from fastattn.onnx.sources.encoder_decoder import prepare

    prepare(swapped, "text2text-generation-with-past", None)
    assert swapped.config.to_dict() == config
    assert len(swapped.lm_head._forward_pre_hooks) == hooks
    fastattn.restore(swapped)
    inputs = sources(model, "right")
    tokens = torch.tensor([[2], [2], [2]])
    with torch.no_grad():
        expected = swapped(**inputs, decoder_input_ids=tokens).logits
    logits, _ = graphs.step(graphs.first(graphs.encode(inputs), inputs["attention_mask"]), tokens)
    assert_close(logits, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "fill-mask"}, "task is 'fill-mask', but BartForConditionalGeneration has the head of"),
        ({"task": "poetry"}, "task is 'poetry', which is none of"),
        ({"example_inputs": {"input_ids": torch.ones(2, 3, dtype=torch.int64)}}, "example_inputs"),
    ],
)
def test_refused_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fastattn.export(new_model("BART"), tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_refused_family(tmp_path):
    """An encoder-decoder that no adapter knows is refused by name, and nothing is written."""
    import transformers

    config = transformers.BlenderbotConfig(
        vocab_size=50,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
    )
    model = transformers.BlenderbotForConditionalGeneration(config)
    with pytest.raises(
        ValueError, match="BlenderbotForConditionalGeneration; transformers models of these families"
    ):
        fastattn.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
