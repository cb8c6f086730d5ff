"""The demonstration's text: a few hundred sentences of very different lengths."""

from statistics import mean

import pytest

from fastattn.demo.texts import fill_of, sentences, tokenized_batches


def test_there_are_a_few_hundred_sentences_and_none_is_repeated():
    lines = sentences()
    assert 300 <= len(lines) <= 400
    assert len(set(lines)) == len(lines)
    assert all(line == line.strip() and line[-1] in ".?!" for line in lines)


def test_lengths_run_from_three_words_to_ninety():
    lengths = sorted(len(line.split()) for line in sentences())
    assert lengths[0] == 3
    assert lengths[-1] >= 90
    assert lengths[len(lengths) // 10] <= 8 and lengths[-len(lengths) // 10] >= 40
    assert 20 <= mean(lengths) <= 30


@pytest.mark.parametrize(("batch_size", "batches"), [(32, 10), (64, 5), (1, 320)])
def test_batches_keep_the_order_and_pad_to_their_own_longest(tokenizer, batch_size, batches):
    lines = sentences()
    tokenized = tokenized_batches(tokenizer, lines, batch_size=batch_size)
    assert len(tokenized) == batches
    assert sum(len(batch["input_ids"]) for batch in tokenized) == len(lines)
    for batch in tokenized:
        assert batch["attention_mask"].sum(dim=1).max() == batch["input_ids"].shape[1]
    first = tokenizer.decode(tokenized[-1]["input_ids"][-1], skip_special_tokens=True)
    assert first == tokenizer.decode(tokenizer(lines[-1])["input_ids"], skip_special_tokens=True)


def test_batches_in_file_order_are_about_half_padding(tokenizer):
    assert 0.40 <= fill_of(tokenized_batches(tokenizer, sentences())) <= 0.55


def test_fill_counts_real_tokens(tokenizer):
    (batch,) = tokenized_batches(tokenizer, ["One.", "One two three four five six."])
    lengths = batch["attention_mask"].sum(dim=1)
    assert fill_of([batch]) == lengths.sum() / (2 * lengths.max())
    assert fill_of(tokenized_batches(tokenizer, ["One."])) == 1.0
