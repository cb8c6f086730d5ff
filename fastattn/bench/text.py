"""Ragged batches out of a text file: its own lines, at their own lengths, with their own tokens."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastattn.bench.workloads import Task, Workload

if TYPE_CHECKING:
    import torch

__all__ = ["TextWorkload", "workload_from_text"]

# Lines drawn from a longer file: more would only be tokenized for longer.
_MOST_LINES = 20_000

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class TextWorkload(Workload):
    """A batch of a text's own lines, padded on the right to the longest of them.

    Attributes:
        rows: the token ids of every sequence.
        text: the file's name, without its folder.
    """

    rows: Rows = ()
    text: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.rows) != self.batch or not all(self.rows):
            raise ValueError(f"rows has {len(self.rows)} sequences; it must have {self.batch}, none empty")
        if (
            max(self.lengths()) != self.seq
            or abs(sum(self.lengths()) / (self.batch * self.seq) - self.fill) > 1e-9
        ):
            raise ValueError("seq and fill are not those of the rows; workload_from_text gives all three")

    def __str__(self) -> str:
        return f"{super().__str__()}, {self.text}"

    def to_dict(self) -> dict[str, Any]:
        """The fields but for the tokens, and the lengths."""
        return {name: value for name, value in super().to_dict().items() if name != "rows"}

    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence in tokens."""
        return tuple(map(len, self.rows))

    def tokens(
        self, vocab_size: int, *, avoid: int | None = None, device: str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """The batch: `input_ids` and `attention_mask`, int64 [batch, seq], padded with `avoid` or 0.

        Raises:
            ValueError: a token is not below `vocab_size`: the tokenizer is another model's.
        """
        import torch

        largest = max(map(max, self.rows))
        if largest >= vocab_size:
            raise ValueError(
                f"{self.text} has token {largest} and the model's vocabulary ends at {vocab_size - 1}: the "
                "tokenizer is another model's"
            )
        padding = 0 if avoid is None else avoid
        ids = torch.tensor([[*row, *[padding] * (self.seq - len(row))] for row in self.rows])
        mask = (torch.arange(self.seq) < torch.tensor(self.lengths())[:, None]).long()
        return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def workload_from_text(
    path: str | Path,
    tokenizer: Callable[..., Any],
    batch: int = 8,
    seq: int = 128,
    fill: float | None = None,
    *,
    seed: int = 0,
    task: Task = "encode",
    new_tokens: int = 0,
) -> TextWorkload:
    """A batch of lines of a text file.

    Args:
        path: UTF-8 text; empty lines are left out. Of more than 20,000 lines so many are drawn.
        tokenizer: a transformers tokenizer.
        batch: number of lines.
        seq: lines are cut to so many tokens. The batch is padded to its longest line, which may be shorter.
        fill: real tokens over batch * longest line, in (0, 1]: lines are exchanged until no exchange brings
            the batch nearer, and the workload's `fill` says what was reached. None takes lines at random.
        seed: of the choice of lines.
        task, new_tokens: as in `Workload`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not UTF-8 text or has fewer lines than the batch, or another argument is wrong.

    Example:
        >>> import pathlib, tempfile
        >>> words = lambda lines, **options: {"input_ids": [[len(w) for w in line.split()] for line in lines]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "lines.txt")
        ...     _ = path.write_text("one two three\\nfour five\\nsix\\n")
        ...     str(workload_from_text(path, words, batch=2, fill=0.67))
        'batch 2 x 3, 67% fill, lines.txt'
    """
    path = Path(path)
    # The same checks as for a workload without text.
    Workload(batch, seq, 1.0 if fill is None else fill, seed, task, new_tokens)
    if not callable(tokenizer):
        raise ValueError(
            f"tokenizer is {tokenizer!r}; a text's tokens take a transformers tokenizer, such as "
            "AutoTokenizer.from_pretrained(...)"
        )
    generator = random.Random(seed)
    rows = _token_rows(path, tokenizer, seq, generator)
    if len(rows) < batch:
        raise ValueError(f"{path.name} has {len(rows)} lines with tokens; a batch of {batch} takes as many")
    chosen = generator.sample(range(len(rows)), batch)
    if fill is not None:
        chosen = _nearest_to_fill(chosen, [len(row) for row in rows], fill)
    sequences = tuple(rows[index] for index in chosen)
    longest = max(map(len, sequences))
    reached = sum(map(len, sequences)) / (batch * longest)
    return TextWorkload(batch, longest, reached, seed, task, new_tokens, sequences, path.name)


def _token_rows(path: Path, tokenizer: Callable[..., Any], seq: int, generator: random.Random) -> Rows:
    """The tokens of every line that has any."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; name a text file, one sequence a line")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not lines:
        raise ValueError(f"{path} has no lines of text")
    if len(lines) > _MOST_LINES:
        lines = generator.sample(lines, _MOST_LINES)
    found = tokenizer(lines, truncation=True, max_length=seq)["input_ids"]
    return tuple(tuple(row) for row in found if len(row))


def _nearest_to_fill(drawn: Sequence[int], lengths: Sequence[int], fill: float) -> list[int]:
    """Which lines make a batch of that fill: the drawn ones, some of them exchanged for others.

    For every length the longest line could have, lines are exchanged one at a time, each time the one that
    brings the sum of lengths nearest; of all, the nearest batch is taken, and of equals the one whose longest
    line is nearest the drawn ones'.
    """
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    drawn_longest = max(lengths[index] for index in drawn)
    best: tuple[float, int, list[int]] | None = None
    for longest in by_length:
        batch = _with_longest(drawn, lengths, by_length, longest)
        if batch is None:
            continue
        _exchange(batch, lengths, longest, fill * len(drawn) * longest)
        reached = sum(lengths[index] for index in batch) / (len(drawn) * longest)
        candidate = (abs(reached - fill), abs(longest - drawn_longest), batch)
        if best is None or candidate[:2] < best[:2]:
            best = candidate
    assert best is not None
    return best[2]


def _with_longest(
    drawn: Sequence[int], lengths: Sequence[int], by_length: dict[int, list[int]], longest: int
) -> list[int] | None:
    """The drawn lines with one of that length first and none longer; None where too few are short enough."""
    anchor = next((index for index in drawn if lengths[index] == longest), by_length[longest][0])
    batch = [anchor, *(index for index in drawn if index != anchor and lengths[index] <= longest)][
        : len(drawn)
    ]
    taken = set(batch)
    spare = (index for index, length in enumerate(lengths) if length <= longest and index not in taken)
    for index in spare:
        if len(batch) == len(drawn):
            break
        batch.append(index)
    return batch if len(batch) == len(drawn) else None


def _exchange(batch: list[int], lengths: Sequence[int], longest: int, wanted: float) -> None:
    """Exchange lines, but for the first, until none brings the sum of their lengths nearer `wanted`."""
    taken = set(batch)
    pool = sorted((length, i) for i, length in enumerate(lengths) if length <= longest and i not in taken)
    total = sum(lengths[index] for index in batch)
    while pool:
        best: tuple[float, int, tuple[int, int]] | None = None
        for place, index in enumerate(batch[1:], start=1):
            # The line that would make the sum right, and its neighbours in length.
            at = bisect_left(pool, (round(lengths[index] + wanted - total), -1))
            for line in pool[max(at - 1, 0) : at + 1]:
                error = abs(total - lengths[index] + line[0] - wanted)
                if best is None or error < best[0]:
                    best = (error, place, line)
        if best is None or best[0] >= abs(total - wanted):
            return
        _, place, line = best
        total += line[0] - lengths[batch[place]]
        pool.remove(line)
        insort(pool, (lengths[batch[place]], batch[place]))
        batch[place] = line[1]
