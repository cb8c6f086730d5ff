"""Batches out of a text: its own tokens, at its own lengths, at the fill asked for."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.bench.text import TextWorkload, workload_from_text
from fastattn.bench.workloads import Workload


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Numbered words, `[CLS]` before and `[SEP]` after them, as BERT's."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing

    words = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, **{f"w{index}": index + 3 for index in range(50)}}
    made = Tokenizer(WordLevel(words, unk_token="[PAD]"))
    made.pre_tokenizer = WhitespaceSplit()
    made.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]")


def line(words: int, first: int = 0) -> str:
    return " ".join(f"w{(first + index) % 50}" for index in range(words))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Forty lines of 1 to 20 words, twice each, some empty ones between."""
    path = tmp_path / "lines.txt"
    lines = [line(count, first) for count in range(1, 21) for first in (0, 7)]
    path.write_text("\n\n".join(lines) + "\n  \n", encoding="utf-8")
    return path


def test_sequences_are_the_files_own_lines(text: Path, tokenizer: Any) -> None:
    workload = workload_from_text(text, tokenizer, batch=6, seq=128)
    batch = workload.tokens(60, avoid=0)
    lines = text.read_text().splitlines()
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        real = ids[mask.bool()].tolist()
        assert real[0] == 1 and real[-1] == 2 and tokenizer.decode(real[1:-1]) in lines
        assert not ids[~mask.bool()].any()
    lengths = tuple(batch["attention_mask"].sum(1).tolist())
    assert workload.lengths() == lengths and workload.seq == max(lengths) == batch["input_ids"].shape[1]
    assert workload.fill == sum(lengths) / (6 * max(lengths))
    assert bool((batch["attention_mask"][:, :-1] >= batch["attention_mask"][:, 1:]).all())


def test_long_lines_are_cut_to_seq_with_their_last_special_token(text: Path, tokenizer: Any) -> None:
    workload = workload_from_text(text, tokenizer, batch=40, seq=8)
    assert workload.seq == 8 and max(workload.lengths()) == 8
    assert all(row[-1] == 2 for row in workload.rows)


def test_the_seed_chooses_the_lines(text: Path, tokenizer: Any) -> None:
    drawn = [workload_from_text(text, tokenizer, batch=5, seed=seed).rows for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("fill", [0.3, 0.47, 0.6, 0.75, 0.9, 1.0])
def test_a_stated_fill_is_reached(text: Path, tokenizer: Any, fill: float) -> None:
    workload = workload_from_text(text, tokenizer, batch=8 if fill < 1 else 2, seq=64, fill=fill)
    # One token of one line more or less.
    assert workload.fill == pytest.approx(fill, abs=1 / workload.seq)
    assert len(set(map(tuple, workload.rows))) == workload.batch, "no line twice"


@pytest.mark.parametrize("fill", [0.05, 0.2, 0.4, 0.55, 0.8, 1.0])
def test_no_other_batch_of_these_lines_is_nearer(tmp_path: Path, tokenizer: Any, fill: float) -> None:
    counts = [3, 4, 9, 9, 17, 30]
    path = tmp_path / "few.txt"
    path.write_text("\n".join(line(count, count) for count in counts))
    workload = workload_from_text(path, tokenizer, batch=3, seq=64, fill=fill)
    reached = [
        sum(count + 2 for count in each) / (3 * (max(each) + 2)) for each in itertools.combinations(counts, 3)
    ]
    assert abs(workload.fill - fill) == pytest.approx(min(abs(each - fill) for each in reached), abs=1e-9)


def test_what_is_told_of_a_text_is_its_name_and_lengths(text: Path, tokenizer: Any) -> None:
    workload = workload_from_text(text, tokenizer, batch=4, task="decode", new_tokens=8)
    told = json.loads(json.dumps(workload.to_dict()))
    assert told["text"] == "lines.txt" and told["lengths"] == list(workload.lengths())
    assert "rows" not in told and str(text.parent) not in json.dumps(told)
    assert str(workload).startswith("decode batch 4 x") and str(workload).endswith("lines.txt")
    assert isinstance(workload, Workload) and workload.new_tokens == 8


def test_another_models_tokens_are_refused(text: Path, tokenizer: Any) -> None:
    workload = workload_from_text(text, tokenizer, batch=40)
    with pytest.raises(ValueError, match=r"lines\.txt has token 29 and the model's vocabulary ends at 19"):
        workload.tokens(20)


def test_wrong_input_is_refused_with_what_is_accepted(text: Path, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.txt is not a file; name a text file"):
        workload_from_text(tmp_path / "gone.txt", tokenizer)
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"empty\.txt has no lines"):
        workload_from_text(tmp_path / "empty.txt", tokenizer)
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: .* at byte 2"):
        workload_from_text(tmp_path / "latin.txt", tokenizer)
    with pytest.raises(ValueError, match="has 40 lines with tokens; a batch of 41"):
        workload_from_text(text, tokenizer, batch=41)
    with pytest.raises(ValueError, match=r"tokenizer is None; .* a transformers tokenizer"):
        workload_from_text(text, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"fill is 1\.5; it must be a fraction"):
        workload_from_text(text, tokenizer, fill=1.5)
    with pytest.raises(ValueError, match="seq is 0"):
        workload_from_text(text, tokenizer, seq=0)
    with pytest.raises(ValueError, match="workload_from_text gives all three"):
        TextWorkload(2, 10, 1.0, rows=((1, 2), (3,)), text="x")


def test_letters_beyond_ascii_are_read_as_utf_8(tmp_path: Path) -> None:
    seen: list[str] = []

    def tokenizer(lines: list[str], **options: Any) -> dict[str, list[list[int]]]:
        seen.extend(lines)
        return {"input_ids": [[ord(letter) for letter in each] for each in lines]}

    (tmp_path / "words.txt").write_bytes("naïve\nÜber 東京\n".encode())
    workload = workload_from_text(tmp_path / "words.txt", tokenizer, batch=2)
    assert seen == ["naïve", "Über 東京"]
    assert torch.equal(workload.tokens(40_000)["attention_mask"].sum(1).sort().values, torch.tensor([5, 7]))
