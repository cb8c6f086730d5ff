"""`fastattn quantize`, `prune` and `compress` as a user calls them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

import fastattn  # noqa: E402
from fastattn.cli import main  # noqa: E402

pytestmark = [pytest.mark.model, pytest.mark.once]

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film", "a", "the", "very", "not", "plot"]


def tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, a language model, an encoder, encoder-decoders, and texts for them."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("models")
    sizes = dict(vocab_size=12, hidden_size=64, num_attention_heads=4, intermediate_size=128)
    bert = transformers.BertConfig(**sizes, num_hidden_layers=2, max_position_embeddings=32)
    gpt = transformers.GPT2Config(vocab_size=12, n_positions=32, n_embd=64, n_layer=2, n_head=4)
    t5 = transformers.T5Config(
        vocab_size=12, d_model=64, d_kv=16, num_heads=4, d_ff=128, num_layers=2, decoder_start_token_id=0
    )
    bart = transformers.BartConfig(
        vocab_size=12, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=32,
        pad_token_id=0, bos_token_id=2, eos_token_id=3, decoder_start_token_id=3, forced_eos_token_id=3,
    )  # fmt: skip
    for name, model in {
        "t5": transformers.T5ForConditionalGeneration(t5),
        "bart": transformers.BartForConditionalGeneration(bart),
        "headless": transformers.T5Model(t5),
        "labels": transformers.T5ForSequenceClassification(t5),
        "classifier": transformers.BertForSequenceClassification(bert),
        "language": transformers.GPT2LMHeadModel(gpt),
        "encoder": transformers.BertModel(bert),
    }.items():
        model.save_pretrained(place / name)
        tokenizer().save_pretrained(place / name)
    lines = ["a very good film\t1", "the plot not good\t0", "good\t1", "a bad very bad film the plot\t0"] * 6
    (place / "labelled.tsv").write_text("\n".join(lines), encoding="utf-8")
    (place / "plain.txt").write_text("\n".join(line[:-2] for line in lines), encoding="utf-8")
    pairs = [f"{line[:-2]}\t{' '.join(reversed(line[:-2].split()))}" for line in lines]
    (place / "pairs.tsv").write_text("\n".join(pairs), encoding="utf-8")
    (place / "unpaired.tsv").write_text("\n".join([*pairs[:2], "no target"]), encoding="utf-8")
    return place


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastattn.compress import sweep_run

    monkeypatch.setattr(sweep_run, "_TIMING_S", 0.02)


def call(*arguments: Any) -> int:
    return main([str(each) for each in arguments])


def test_a_quantized_copy_is_written_and_answers_nearly_alike(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("quantize", folder / "classifier", "int8", "--output", tmp_path / "q", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["status"] for layer in report["layers"]} >= {"quantized"}
    before, after = fastattn.load(folder / "classifier"), fastattn.load(tmp_path / "q")
    batch = tokenizer()(["a good film", "bad"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(after(**batch).logits, before(**batch).logits, atol=0.02, rtol=0.05)
    weights = [each.stat().st_size for name in ("q", "") for each in (tmp_path / name).glob("*.safetensors")]
    assert weights and weights[0] < (folder / "classifier" / "model.safetensors").stat().st_size / 2


def test_a_pruned_copy_is_written_and_can_be_pruned_on_labels(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--heads", "0.5", "--ffn", "32", "--importance", "taylor")
    data = ("--calibration", folder / "labelled.tsv")
    assert call("prune", folder / "classifier", *options, *data, "--output", tmp_path / "p") == 0
    pruned = fastattn.load(tmp_path / "p")
    layer = pruned.bert.encoder.layer[0]
    assert layer.attention.self.query.out_features == 32 and layer.intermediate.dense.out_features == 96
    assert capsys.readouterr().out
    # What one verb wrote, another reads.
    assert call("quantize", tmp_path / "p", "int8", "--output", tmp_path / "pq") == 0


POINTS = [{"prune": {"ffn": 0.5}}, {"prune": {"ffn": 0.5}, "quantize": "int8", "name": "both"}]


@pytest.mark.parametrize(
    ("model", "texts", "metric"),
    [
        ("classifier", "labelled.tsv", "accuracy"),
        ("language", "plain.txt", "perplexity"),
        ("encoder", "plain.txt", "cosine"),
        ("t5", "pairs.tsv", "perplexity"),
        ("bart", "pairs.tsv", "perplexity"),
    ],
)
def test_compress_prunes_recovers_quantizes_and_measures(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: str,
    texts: str,
    metric: str,
) -> None:
    (tmp_path / "points.json").write_text(json.dumps(POINTS), encoding="utf-8")
    command = (
        "compress", folder / model, "--train", folder / texts, "--evaluate", folder / texts,
        "--output", tmp_path / "out", "--points", tmp_path / "points.json", "--seq", "8", "--epochs", "1",
        "--batch-size", "8", "--json",
    )  # fmt: skip
    assert call(*command) == 0
    result = json.loads(capsys.readouterr().out)
    assert [point["status"] for point in result["points"]] == ["measured"] * 3, result["points"]
    assert result["metric"] == metric and result["higher_is_better"] == (metric != "perplexity")
    sizes = [point["model_bytes"] for point in result["points"]]
    assert sizes == sorted(sizes, reverse=True)
    both = fastattn.load(tmp_path / "out" / result["points"][2]["folder"])
    assert sum(each.nbytes for each in both.state_dict().values()) < sizes[0]
    assert "sweep.html" in {each.name for each in (tmp_path / "out").iterdir()}
    # Called again it reads everything back.
    assert call(*command) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["points"] == result["points"]


def test_an_encoder_decoders_score_is_the_perplexity_of_the_targets_exported_or_not(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "points.json").write_text(json.dumps([{"export": "fp32"}]), encoding="utf-8")
    pairs = folder / "pairs.tsv"
    options = ("--points", tmp_path / "points.json", "--epochs", "1", "--batch-size", "8", "--json")
    files = ("--train", pairs, "--evaluate", pairs, "--output", tmp_path / "out")
    assert call("compress", folder / "t5", *files, *options) == 0
    untouched, exported = json.loads(capsys.readouterr().out)["points"]
    assert exported["status"] == "measured", exported
    # The model's own loss, of one target at a time: a mean over its tokens.
    model, words = fastattn.load(folder / "t5"), tokenizer()
    loss, count = 0.0, 0
    for line in pairs.read_text(encoding="utf-8").splitlines():
        source, target = (words(each, return_tensors="pt")["input_ids"] for each in line.split("\t"))
        with torch.no_grad():
            loss += float(model(input_ids=source, labels=target).loss) * target.numel()
        count += target.numel()
    assert untouched["score"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert exported["score"] == pytest.approx(untouched["score"], rel=1e-4)
    assert (tmp_path / "out" / exported["folder"] / "decoder_model_merged.onnx").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "classifier", "int3", "--output", "new"), "int3"),
        (("quantize", "classifier", "int8", "--output", "labelled.tsv"), "exists already"),
        (("quantize", "classifier", "int4-weight", "--method", "gptq", "--output", "new"), "calibration"),
        (("prune", "classifier", "--heads", "half", "--output", "new"), "--heads is 'half'"),
        (("prune", "classifier", "--ffn", "1.5", "--output", "new"), "1.5"),
        (("prune", "classifier", "--heads", "0.5", "--importance", "taylor", "--output", "new"),
         "calibration"),
        (("compress", "classifier", "--train", "plain.txt", "--evaluate", "plain.txt", "--output", "new"),
         "a sentence, a tab and a label from 0 to 1"),
        (("compress", "encoder", "--train", "none.txt", "--evaluate", "plain.txt", "--output", "new"),
         "cannot be read"),
        (("compress", "language", "--train", "plain.txt", "--evaluate", "plain.txt", "--output", "new",
          "--seq", "5000"), "a window takes 5000"),
        (("compress", "t5", "--train", "unpaired.tsv", "--evaluate", "pairs.tsv", "--output", "new"),
         "text 3 is 'no target'; an encoder-decoder's are a source, a tab and its target"),
        (("compress", "headless", "--train", "pairs.tsv", "--evaluate", "pairs.tsv", "--output", "new"),
         "no head that predicts a target"),
        (("compress", "labels", "--train", "pairs.tsv", "--evaluate", "pairs.tsv", "--output", "new"),
         "no head that predicts a target"),
    ],
)  # fmt: skip
def test_bad_arguments_are_one_line_and_leave_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    files = {each.name for each in folder.iterdir()} | {"new", "none.txt"}
    assert call(*(folder / each if each in files else each for each in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert not (folder / "new").exists()
