"""Search finds what a reader would find, with the embeddings that the model's own library makes."""

import json
from types import SimpleNamespace

import pytest
import torch

import fastattn
from fastattn.demo.search import Hit, check_pooling, embed, nearest, same_answer
from fastattn.demo.texts import sentences, tokenized_batches

QUESTIONS = {
    "How do I keep my laptop from overheating?": {"laptop", "thermal paste", "cooling pad"},
    "How do I get my money back?": {"payments back", "deposit"},
    "Why is my program slow?": {"slow program", "cache makes a program faster"},
    "How can I memorise new words?": {"remember a list of words", "vocabulary"},
}


def runner(model):
    def run(batch):
        with torch.inference_mode():
            return model(**batch)

    return run


@pytest.fixture(scope="module")
def before_and_after(minilm_folder, tokenizer):
    """Embeddings of all questions and all sentences, by the untouched model and by the same model swapped."""
    model = pytest.importorskip("transformers").AutoModel.from_pretrained(minilm_folder).eval()
    batches = tokenized_batches(tokenizer, [*QUESTIONS, *sentences()])
    before = embed(runner(model), batches)
    fastattn.optimize(model)
    return before, embed(runner(model), batches)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_nearest_sentences_answer_the_question_before_and_after_the_swap(before_and_after, question):
    index, texts = list(QUESTIONS).index(question), sentences()
    before, after = (nearest(rows[index], rows[len(QUESTIONS) :], texts) for rows in before_and_after)
    assert all(any(word in hit.sentence for word in QUESTIONS[question]) for hit in before[:2]), before
    assert before == sorted(before, key=lambda hit: -hit.similarity)
    assert same_answer(before, after), (before, after)
    assert max(abs(a.similarity - b.similarity) for a, b in zip(before, after, strict=True)) < 1e-5


def test_embeddings_are_those_of_sentence_transformers(model, tokenizer, minilm_folder):
    library = pytest.importorskip("sentence_transformers")
    reference = library.SentenceTransformer(str(minilm_folder), device="cpu")
    some = sentences()[:20]
    expected = torch.as_tensor(reference.encode(some))
    assert torch.allclose(embed(runner(model), tokenized_batches(tokenizer, some)), expected, atol=1e-5)


def test_padded_positions_do_not_count_whatever_they_hold():
    hidden = torch.randn(2, 4, 8)
    batch = {"attention_mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}

    output = SimpleNamespace(last_hidden_state=hidden)
    clean = embed(lambda _: output, [batch])
    hidden[0, 2:] = float("nan")
    assert torch.equal(embed(lambda _: output, [batch]), clean)


def test_arrays_are_taken_as_tensors_are():
    hidden = torch.randn(1, 3, 8)
    batch = {"attention_mask": torch.ones(1, 3, dtype=torch.long)}
    tensor = SimpleNamespace(last_hidden_state=hidden)
    array = SimpleNamespace(last_hidden_state=hidden.numpy())
    assert torch.equal(embed(lambda _: tensor, [batch]), embed(lambda _: array, [batch]))


def test_answers_differ_unless_only_ties_change_places():
    first, second, third = Hit(4, 0.7, "a"), Hit(2, 0.5, "b"), Hit(9, 0.5, "c")
    assert same_answer([first, second, third], [first, third, second])
    assert not same_answer([first, second], [second, first])
    assert not same_answer([first, second], [first])


def test_nearest_returns_no_more_than_there_is():
    rows = torch.eye(2)
    assert [hit.index for hit in nearest(rows[1], rows, ["a", "b"], count=5)] == [1, 0]


def test_a_model_that_pools_otherwise_is_refused(minilm_folder, tmp_path):
    check_pooling(minilm_folder)
    (tmp_path / "1_Pooling").mkdir()
    kinds = ["Transformer", "Pooling", "Normalize"]
    (tmp_path / "modules.json").write_text(json.dumps([{"type": f"x.{kind}"} for kind in kinds]))
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(ValueError, match="pooling_mode_cls_token; needed are the mean and normalization"):
        check_pooling(tmp_path)
