"""What is timed: a contender, how it is made ready, and what is said of one that fails."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastattn.bench.memory import Memory, is_out_of_memory

__all__ = ["Contender", "FailedError", "MissingError", "Prepared", "describe"]


class MissingError(RuntimeError):
    """What a contender needs is not on this machine; raised by its `prepare`. The row says "missing: ..."."""


class FailedError(RuntimeError):
    """A contender failed in a way that has no exception of its own; the message is the row's reason."""


Parts = Callable[[Any], Mapping[str, Sequence[float]]]


@dataclass(frozen=True)
class Prepared:
    """What `Contender.prepare` made.

    Attributes:
        run: computes it once and returns the output; one that times itself is a `timers.SelfTimed`.
        stages_ms: what was done once, in order ("load model", "export", "compile", "load"), in milliseconds.
        answer: makes what parity is computed on from the last output; the output itself if None. Not timed.
        parts: milliseconds of named parts of one call, from its output, such as {"first_token_ms": [12.0]}.
        held: what was built once for several measurements and is used here: memory it holds, which counts
            to this contender's; None where `prepare` builds everything.
        versions: of the packages that run it, where its environment is not this process'.
    """

    run: Callable[[], Any]
    stages_ms: Mapping[str, float] = field(default_factory=dict)
    answer: Callable[[Any], Any] | None = None
    parts: Parts | None = None
    held: Memory | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """One way of computing the same thing.

    Attributes:
        name: unique among the contenders measured together.
        run: computes it once and returns the output.
        prepare: makes `run`, where making it may fail (compiling, exporting); give one of the two.
        dtype: the precision it computes in, for the table.
        against: name of a further contender to give a ratio over, beside the baseline.
        highlight: whether it is drawn as ours.
    """

    name: str
    run: Callable[[], Any] | None = None
    prepare: Callable[[], Callable[[], Any] | Prepared] | None = None
    dtype: str = "fp32"
    against: str | None = None
    highlight: bool = False

    def __post_init__(self) -> None:
        if (self.run is None) == (self.prepare is None):
            raise ValueError(f"contender {self.name!r} needs either run or prepare")

    def ready(self) -> Prepared:
        """The run to time, made now."""
        made = self.run if self.prepare is None else self.prepare()
        if isinstance(made, Prepared):
            return made
        assert made is not None
        return Prepared(made)


def describe(error: BaseException) -> str:
    """An error as a row's reason: one line that says first whether something is missing or memory ran out.

    Example:
        >>> describe(MissingError("C++ compiler"))
        'missing: C++ compiler'
        >>> describe(ValueError("first line\\nsecond line"))
        'ValueError: first line'
    """
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    line = lines[0] if lines else "no message"
    if isinstance(error, MissingError):
        return f"missing: {_short(line)}"
    if is_out_of_memory(error):
        return _short(line if line.startswith("out of memory") else f"out of memory: {line}")
    return _short(line if isinstance(error, FailedError) else f"{type(error).__name__}: {line}")


def _short(text: str) -> str:
    return text if len(text) <= 160 else f"{text[:157]}..."
