"""Exports in transformers' pipelines: the same answers as the original model's, and no complaint."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from word_tokenizer import word_tokenizer

import fastattn

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("optimum")


WORDS = 400
TEXTS = ["w20 w21 w22", "w30 w31 w32 w33 w34 w35 w36"]


@pytest.fixture
def answers(tmp_path, caplog):
    """`answers(task, model, inputs, tokenizer, **options)`: of pipelines of the model and of its export."""

    def ask(task, model, inputs, tokenizer=None, **options):
        preprocessors = {
            key: options.pop(key) for key in ("image_processor", "feature_extractor") if key in options
        }
        fastattn.export(model, tmp_path / "export", tokenizer=tokenizer, verify=False, layouts=())
        found = []
        for each in (model, fastattn.load(tmp_path / "export")):
            with caplog.at_level(logging.ERROR):
                torch.manual_seed(0)
                asked = transformers.pipeline(
                    task, model=each, tokenizer=tokenizer, device="cpu", **preprocessors
                )
                found.append(asked(copy.deepcopy(inputs), **options))
        assert not [record.message for record in caplog.records if record.levelno >= logging.ERROR]
        return found

    return ask


def assert_same(found, expected):
    """Nested lists and dictionaries; numbers to 1e-4."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = list(found.values()), list(expected.values())
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for each, wanted in zip(found, expected, strict=True):
            assert_same(each, wanted)
    elif isinstance(expected, (float, np.floating)):
        assert found == pytest.approx(expected, abs=1e-4)
    else:
        assert found == expected


@pytest.mark.parametrize(
    ("task", "class_name", "inputs", "options"),
    [
        ("feature-extraction", "BertModel", TEXTS, {}),
        ("fill-mask", "BertForMaskedLM", "w20 [MASK] w22", {}),
        ("text-classification", "BertForSequenceClassification", TEXTS, {"top_k": None, "batch_size": 2}),
        ("token-classification", "BertForTokenClassification", TEXTS, {}),
        (
            "zero-shot-classification",
            "BertForSequenceClassification",
            TEXTS[0],
            {"candidate_labels": ["w50", "w51"], "hypothesis_template": "w60 {}"},
        ),
    ],
)
def test_text(answers, new_bert, task, class_name, inputs, options):
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config = {"id2label": labels, "label2id": {value: key for key, value in labels.items()}}
    model = new_bert(class_name, num_hidden_layers=1, **config).eval()
    expected, found = answers(task, model, inputs, word_tokenizer(WORDS), **options)
    assert_same(found, expected)


def test_text_generation(answers):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_embd=48, n_head=3, n_layer=1, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    expected, found = answers(
        "text-generation", model, TEXTS, word_tokenizer(WORDS, pair=False), max_new_tokens=6, batch_size=2
    )
    assert found == expected


def test_image_classification(answers):
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=48,
        num_attention_heads=3,
        num_hidden_layers=1,
        intermediate_size=40,
        image_size=32,
        patch_size=8,
        num_labels=4,
    )
    model = transformers.ViTForImageClassification(config).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    expected, found = answers(
        "image-classification", model, image.fromarray(pixels), image_processor=processor, top_k=4
    )
    assert_same(found, expected)


def test_automatic_speech_recognition(answers):
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=48,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        max_source_positions=100,
        max_target_positions=32,
        pad_token_id=WORDS - 9,
        bos_token_id=WORDS - 9,
        eos_token_id=WORDS - 9,
        decoder_start_token_id=WORDS - 8,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    sound = {
        "raw": np.sin(np.arange(30000, dtype=np.float32) / 7),
        "sampling_rate": extractor.sampling_rate,
    }
    special = ("endoftext", "startoftranscript", "en", "translate", "transcribe", "startoflm", "startofprev")
    special += ("nospeech", "notimestamps")
    # Whatever comes after the last special token is a time.
    words = [f"w{token}" for token in range(WORDS - len(special))] + [f"<|{word}|>" for word in special]
    tokenizer = transformers.WhisperTokenizer(
        vocab={word: token for token, word in enumerate(words)}, merges=[]
    )
    expected, found = answers(
        "automatic-speech-recognition",
        model,
        [sound, dict(sound)],
        tokenizer,
        feature_extractor=extractor,
        generate_kwargs={"max_new_tokens": 8},
    )
    assert found == expected
    assert all(answer["text"] for answer in found)
