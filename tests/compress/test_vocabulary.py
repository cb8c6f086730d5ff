"""A vocabulary trimmed to a corpus: the same splits, the same hidden states, fewer rows."""

from __future__ import annotations

import copy
import csv
import os
from pathlib import Path
from random import Random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from fastattn.compress.vocabulary import trim_vocabulary

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.model

DATA = Path(os.environ.get("FASTATTN_DATA", "/nowhere"))
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="FASTATTN_DATA is not set")

# Words, numbers, accents, characters that no vocabulary has, words that no piece begins or ends.
CORPUS = [
    "The quick brown fox jumps over the lazy dog, 42 times!",
    "Unaffordable naïve façade: antidisestablishmentarianism.",
    "A word the tokenizer gives up: quickly\U00013000, fox\U00013001es, \U00013002.",
    "O Romeo, Romeo! wherefore art thou Romeo?\n\tDeny thy father and refuse thy name;",
]


def minilm():
    from fastattn.cli.models import load_model

    return load_model("minilm")


def gpt2(**options):
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **options)
    tokenizer = transformers.GPT2Tokenizer.from_pretrained(DATA / "gpt2_tokenizer")
    return transformers.GPT2LMHeadModel(config).eval(), tokenizer


def unigram(**options):
    """A T5 of random weights, and a Unigram tokenizer trained on what the corpus is not."""
    text = (DATA / "tinyshakespeare" / "input.txt").read_text()[:200_000].splitlines()
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=2000, special_tokens=specials, unk_token="<unk>", show_progress=False, **options
    )
    backend.train_from_iterator(text, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(tokenizer) + 12, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2,
        decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config).eval(), tokenizer


def hidden(model, batch):
    if model.config.is_encoder_decoder:
        batch = {**batch, "decoder_input_ids": batch["input_ids"]}
    with torch.no_grad():
        out = model(**batch, output_hidden_states=True)
    return [*(out.get("hidden_states") or ()), *(out.get("decoder_hidden_states") or ())]


CASES = {"wordpiece": minilm, "byte-level bpe": gpt2, "unigram": unigram}


@pytest.fixture(scope="module", params=CASES, ids=lambda name: name.replace(" ", "-"))
def trimmed(request):
    if not DATA.is_dir() and request.param != "wordpiece":
        pytest.skip("FASTATTN_DATA is not set")
    model, tokenizer = CASES[request.param]()
    original = copy.deepcopy(model)
    new_tokenizer, report = trim_vocabulary(model, tokenizer, CORPUS)
    return original, tokenizer, model, new_tokenizer, report


def test_the_corpus_is_split_the_same(trimmed):
    _, tokenizer, _, new_tokenizer, report = trimmed
    for text in CORPUS:
        assert new_tokenizer.tokenize(text) == tokenizer.tokenize(text)
        before = tokenizer.decode(tokenizer(text)["input_ids"])
        assert new_tokenizer.decode(new_tokenizer(text)["input_ids"]) == before
    assert len(new_tokenizer) <= report.tokens_after < report.tokens_before / 4


def test_the_hidden_states_are_bitwise_the_same(trimmed):
    original, tokenizer, model, new_tokenizer, _ = trimmed
    for text in CORPUS:
        options = dict(return_tensors="pt", truncation=True, max_length=32)
        before = hidden(original, tokenizer(text, **options))
        after = hidden(model, new_tokenizer(text, **options))
        assert before and len(before) == len(after)
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_rows_that_stay_are_those_of_the_tokens(trimmed):
    original, tokenizer, model, new_tokenizer, report = trimmed
    old_rows, new_rows = original.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert new_rows.shape[0] == report.tokens_after == model.config.vocab_size
    for token, index in new_tokenizer.get_vocab().items():
        assert torch.equal(new_rows[index], old_rows[tokenizer.convert_tokens_to_ids(token)]), token


def test_special_tokens_and_configs_name_the_same_tokens(trimmed):
    original, tokenizer, model, new_tokenizer, _ = trimmed
    assert new_tokenizer.special_tokens_map == tokenizer.special_tokens_map
    kept = {token: index for token, index in new_tokenizer.get_vocab().items()}
    for holder in ("config", "generation_config"):
        old, new = getattr(original, holder, None), getattr(model, holder, None)
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"):
            index = getattr(old, name, None)
            if index is not None:
                assert getattr(new, name) == kept[tokenizer.convert_ids_to_tokens(index)], name


def test_saved_and_loaded_it_is_the_same(trimmed, tmp_path):
    _, _, model, new_tokenizer, _ = trimmed
    model.save_pretrained(tmp_path)
    new_tokenizer.save_pretrained(tmp_path)
    loaded, again = type(model).from_pretrained(tmp_path), type(new_tokenizer).from_pretrained(tmp_path)
    batch = again(CORPUS[0], return_tensors="pt")
    assert torch.equal(batch["input_ids"], new_tokenizer(CORPUS[0], return_tensors="pt")["input_ids"])
    for one, other in zip(hidden(model, batch), hidden(loaded.eval(), batch), strict=True):
        assert torch.equal(one, other)
    assert again.get_vocab() == new_tokenizer.get_vocab()


def test_other_text_is_split_in_smaller_pieces(trimmed):
    _, tokenizer, _, new_tokenizer, _ = trimmed
    text = "Zebras photograph helicopters."
    pieces = new_tokenizer.tokenize(text)
    assert len(pieces) > len(tokenizer.tokenize(text))
    if tokenizer.unk_token not in tokenizer.tokenize(text):
        assert new_tokenizer.unk_token not in pieces


@needs_data
def test_bytes_reach_every_text():
    model, tokenizer = gpt2()
    new_tokenizer, report = trim_vocabulary(model, tokenizer, ["plain text"])
    text = "Ωmega \U0001f600 日本\x00"
    assert new_tokenizer.decode(new_tokenizer(text)["input_ids"]) == text
    assert "down to bytes" in report.table()


@needs_data
@pytest.mark.parametrize("byte_fallback", [False, True], ids=["plain", "bytes"])
@pytest.mark.parametrize("marks", [("", ""), ("", "</w>"), ("##", "")], ids=["bare", "suffix", "prefix"])
@pytest.mark.once
def test_every_form_of_bpe_splits_a_real_corpus_the_same(marks, byte_fallback):
    """Trained on Shakespeare, trimmed to film reviews: other words, other merges on the way to them."""
    prefix, suffix = marks
    text = (DATA / "tinyshakespeare" / "input.txt").read_text()[:300_000].splitlines()
    options = {"continuing_subword_prefix": prefix, "end_of_word_suffix": suffix}
    options = {name: mark for name, mark in options.items() if mark}
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=byte_fallback, **options))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256) if byte_fallback)]
    trainer = trainers.BpeTrainer(vocab_size=3000, special_tokens=specials, show_progress=False, **options)
    backend.train_from_iterator(text, trainer)
    texts = reviews(400)
    model = nn.Embedding(backend.get_vocab_size(), 4)
    trimmed, report = trim_vocabulary(model, backend, texts)
    assert report.tokens_after < report.tokens_before
    for one in texts:
        assert trimmed.encode(one).tokens == backend.encode(one).tokens


LETTERS = "žčšđ"


def random_tokenizer(kind: str, random: Random) -> Tokenizer:
    """Few pieces, letters missing: words that are given up, unknown letters inside words. Not ASCII letters,
    which are kept whatever the corpus has.
    """
    words = sorted({"".join(random.choices(LETTERS, k=random.randint(1, 4))) for _ in range(14)})
    random.shuffle(words)
    if kind == "Unigram":
        return Tokenizer(models.Unigram([("?", -3.0)] + [(w, -9 * random.random()) for w in words], unk_id=0))
    if kind == "WordPiece":
        marked = [word if random.random() < 0.5 else f"##{word}" for word in words]
        vocabulary = {piece: index for index, piece in enumerate(["?", *marked])}
        return Tokenizer(models.WordPiece(vocabulary, unk_token="?", max_input_chars_per_word=20))
    held = ["?", *random.sample(LETTERS, 3)]
    merges: list[tuple[str, str]] = []
    for _ in range(10):
        left, right = random.choices(held[1:], k=2)
        merges.append((left, right))
        held += [left + right] if left + right not in held else []
    merges = list(dict.fromkeys(merges))
    return Tokenizer(models.BPE({w: i for i, w in enumerate(held)}, merges, unk_token="?"))


@pytest.mark.once
@pytest.mark.parametrize("kind", ["BPE", "Unigram", "WordPiece"])
def test_random_tokenizers_split_a_random_corpus_the_same(kind):
    fewer = 0
    for seed in range(300):
        random = Random(seed)
        tokenizer = random_tokenizer(kind, random)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        texts = ["".join(random.choices(f"{LETTERS} ", [5, 5, 5, 5, 3], k=9)) + LETTERS[0] for _ in range(3)]
        model = nn.Embedding(tokenizer.get_vocab_size(), 2)
        trimmed, report = trim_vocabulary(model, tokenizer, texts)
        for text in texts:
            assert trimmed.encode(text).tokens == tokenizer.encode(text).tokens, (seed, text)
        fewer += report.tokens_after < report.tokens_before
    assert fewer > 50


@pytest.mark.once
def test_a_word_that_is_given_up_stays_unknown():
    """It is unknown because the longest piece, "žč", is taken first: "ž" and "##čš" would get through."""
    names = ["?", "ž", "žč", "đ", "##čš"]
    tokenizer = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trimmed, report = trim_vocabulary(nn.Embedding(5, 2), tokenizer, ["ž đčš žčš"])
    assert trimmed.encode("ž đčš žčš").tokens == ["ž", "đ", "##čš", "?"]
    assert report.unknown == 1 / 4


@pytest.mark.once
@needs_data
def test_the_expected_share_of_new_tokens_holds_on_other_text():
    model, tokenizer = minilm()
    texts = reviews(2000)
    used, held_out = texts[:1000], texts[1000:]
    _, report = trim_vocabulary(model, tokenizer, used)
    seen = {index for text in used for index in tokenizer(text, add_special_tokens=False)["input_ids"]}
    new = [index not in seen for text in held_out for index in tokenizer(text)["input_ids"][1:-1]]
    assert report.unseen == pytest.approx(sum(new) / len(new), rel=0.15)


@needs_data
def test_a_decoder_generates_over_what_is_left():
    model, tokenizer = gpt2(eos_token_id=50256, bos_token_id=50256)
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids("Ġfox"), 30_000]
    model.generation_config.pad_token_id = 50256
    original = copy.deepcopy(model)
    trimmed, report = trim_vocabulary(model, tokenizer, CORPUS)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.generation_config.suppress_tokens == [trimmed.convert_tokens_to_ids("Ġfox")]
    batch = trimmed(CORPUS[0], return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert int(out.max()) < report.tokens_after
    # The logits of the tokens that are left are what they were.
    kept = [
        tokenizer.convert_tokens_to_ids(token) for token in trimmed.convert_ids_to_tokens(range(len(trimmed)))
    ]
    with torch.no_grad():
        before = original(**tokenizer(CORPUS[0], return_tensors="pt")).logits[..., kept]
        torch.testing.assert_close(model(**batch).logits, before)


def test_tied_parameters_stay_the_same_objects_and_train():
    _, tokenizer = minilm()
    masked = transformers.BertForMaskedLM(transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64,
    ))  # fmt: skip
    weight, bias = masked.get_input_embeddings().weight, masked.cls.predictions.bias
    trimmed, report = trim_vocabulary(masked, tokenizer, CORPUS, keep=["[MASK]", "zebra"])
    assert masked.get_input_embeddings().weight is weight and masked.cls.predictions.bias is bias
    assert masked.cls.predictions.decoder.bias is bias and len(bias) == report.tokens_after
    batch = trimmed("the quick [MASK]", return_tensors="pt")
    masked(**batch, labels=batch["input_ids"]).loss.backward()
    assert weight.grad.shape == weight.shape
    assert trimmed.tokenize("zebra") == ["zebra"]


@pytest.mark.once
def test_positions_counted_from_the_padding_do_not_move():
    """RoBERTa's first position is the padding's id + 1: what stands below it has to stay."""
    words = {word: index for index, word in enumerate(["unused", "x", "y", "<pad>", "<unk>", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    config = transformers.RobertaConfig(
        vocab_size=7, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        pad_token_id=3, bos_token_id=None, eos_token_id=None, max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.RobertaModel(config).eval()
    before = model(torch.tensor([tokenizer.encode("a a").ids])).last_hidden_state
    trimmed, _ = trim_vocabulary(model, tokenizer, ["a"])
    assert torch.equal(model(torch.tensor([trimmed.encode("a a").ids])).last_hidden_state, before)
    assert trimmed.get_vocab_size() == 6


@pytest.mark.once
def test_another_model_of_the_same_config_is_left_alone():
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    one, other = transformers.BertModel(config), transformers.BertModel(config)
    trim_vocabulary(one, minilm()[1], CORPUS)
    assert other.config.vocab_size == config.vocab_size == 30522 > one.config.vocab_size


@pytest.mark.once
def test_a_fused_model_keeps_its_rows_when_it_is_restored():
    import fastattn

    model, tokenizer = minilm()
    fastattn.optimize(model)
    trimmed, report = trim_vocabulary(model, tokenizer, CORPUS)
    fastattn.restore(model)
    assert model.config.vocab_size == report.tokens_after
    assert model(**trimmed(CORPUS, padding=True, return_tensors="pt")).last_hidden_state.isfinite().all()


class Translator(nn.Module):
    """A plain model: an embedding, positions as many as tokens would be, a head of its own."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(rows, 8, padding_idx=2), nn.Embedding(rows, 8)
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, rows)

    def forward(self, ids):
        return self.head(self.layer(self.words(ids)))


@pytest.mark.once
def test_a_plain_model_with_its_own_head():
    words = {word: index for index, word in enumerate(["<unk>", "blue", "<pad>", "red", "green"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<pad>"])
    model = Translator(6)
    before = model(torch.tensor([[3, 2]]))
    trimmed, report = trim_vocabulary(model, tokenizer, ["red green"])
    ids = torch.tensor([[trimmed.token_to_id("red"), trimmed.token_to_id("<pad>")]])
    torch.testing.assert_close(model(ids), before[..., [0, 2, 3, 4]])
    assert report.tables == ("words.weight", "head.weight", "head.bias")
    assert model.positions.num_embeddings == 6 and model.words.padding_idx == 1


@pytest.mark.once
@pytest.mark.parametrize(
    ("texts", "keep", "rows", "error", "said"),
    [
        ("one text", (), 30522, TypeError, "give a list of texts"),
        ([], (), 30522, ValueError, "empty"),
        (["ok", 3], (), 30522, TypeError, "holds a int"),
        (["ok"], ["zzzzz"], 30522, ValueError, "'zzzzz', which is no token"),
        (["ok"], (), 100, ValueError, "ids up to 30521 and the model 100 rows"),
    ],
)
def test_bad_input_is_told_and_the_model_untouched(texts, keep, rows, error, said):
    _, tokenizer = minilm()
    model = transformers.BertModel(transformers.BertConfig(
        vocab_size=rows, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    ))  # fmt: skip
    config = model.config
    with pytest.raises(error, match=said):
        trim_vocabulary(model, tokenizer, texts, keep)
    assert model.get_input_embeddings().weight.shape[0] == rows and model.config is config


def reviews(count: int) -> list[str]:
    with open(DATA / "sst2" / "train.tsv", encoding="utf-8", newline="") as file:
        rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [max(row, key=len) for row, _ in zip(rows, range(count + 1), strict=False)][1:]
