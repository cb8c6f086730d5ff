"""What is run: batches of tokens whose lengths are spread as real text's are, to a stated fill."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    import torch

    from fastattn.bench.contenders.source import Kind

__all__ = ["TASKS", "Task", "Workload", "auto_workloads", "maximum_positions"]

Task = Literal["encode", "classify", "prefill", "decode", "train"]
TASKS: tuple[Task, ...] = get_args(Task)

# Sentence lengths in running text are close to log-normal; this is the standard deviation of the logarithm.
_SIGMA = 0.6
# Of the workloads that are chosen for the caller, in tokens.
_AUTO_LENGTH, _AUTO_NEW = 128, 32


@dataclass(frozen=True)
class Workload:
    """A batch of right-padded sequences; the same values always give the same tokens.

    The data type is the contender's, not the workload's: that is what lets bf16 rows be timed in the same
    rounds as the fp32 ones they are compared with.

    Attributes:
        batch: number of sequences.
        seq: padded length in tokens. One sequence has exactly this length wherever the fill allows it.
        fill: real tokens over batch * seq, in (0, 1]; hit to the nearest token.
        seed: of the token values and of the order of the lengths.
        task: what is done with the batch: "encode" (hidden states), "classify" (a head's logits), "prefill"
            (the logits after a prompt), "decode" (tokens after a prompt, greedily), "train" (forward and
            backward).
        new_tokens: tokens a "decode" adds to each sequence; 0 for the others.
    """

    batch: int = 8
    seq: int = 128
    fill: float = 1.0
    seed: int = 0
    task: Task = "encode"
    new_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of 1 or more")
        if isinstance(self.fill, bool) or not isinstance(self.fill, int | float) or not 0 < self.fill <= 1:
            raise ValueError(
                f"fill is {self.fill!r}; it must be a fraction above 0 and at most 1, such as 0.47"
            )
        if self.task not in TASKS:
            raise ValueError(f"task is {self.task!r}; it must be one of {', '.join(TASKS)}")
        if (self.new_tokens > 0) != (self.task == "decode") or self.new_tokens < 0:
            raise ValueError(
                f"new_tokens is {self.new_tokens!r} for task {self.task!r}; a decode adds 1 or more, others 0"
            )

    def __str__(self) -> str:
        what = "" if self.task == "encode" else f"{self.task} "
        more = f", {self.new_tokens} new tokens" if self.new_tokens else ""
        return f"{what}batch {self.batch} x {self.seq}, {self.fill:.0%} fill{more}"

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the lengths they give."""
        return {**asdict(self), "lengths": list(self.lengths())}

    def lengths(self) -> tuple[int, ...]:
        """The length of each sequence in tokens: log-normal quantiles scaled to the fill, each at least 1.

        Example:
            >>> Workload(batch=4, seq=100, fill=0.5).lengths()
            (30, 100, 16, 54)
        """
        total = max(self.batch, round(self.fill * self.batch * self.seq))
        # The padded length is the longest sequence's, unless too little is filled for one that long.
        longest = [self.seq] if total >= self.seq + self.batch - 1 else []
        lengths = longest + _spread(self.batch - len(longest), total - sum(longest), self.seq)
        random.Random(self.seed).shuffle(lengths)
        return tuple(lengths)

    def tokens(
        self, vocab_size: int, *, avoid: int | None = None, device: str = "cpu"
    ) -> dict[str, torch.Tensor]:
        """The batch: `input_ids` and `attention_mask`, int64 [batch, seq], padded with `avoid` or 0.

        Args:
            vocab_size: token ids are drawn below it.
            avoid: the padding token, which no real position holds (some models count positions by it).
            device: where the tensors are put.
        """
        import torch

        generator = torch.Generator().manual_seed(self.seed)
        padding = 0 if avoid is None else avoid
        ids = torch.randint(0, vocab_size, (self.batch, self.seq), generator=generator)
        ids = torch.where(ids == padding, (padding + 1) % vocab_size, ids)
        mask = (torch.arange(self.seq) < torch.tensor(self.lengths())[:, None]).long()
        return {
            "input_ids": torch.where(mask == 1, ids, padding).to(device),
            "attention_mask": mask.to(device),
        }


def _spread(count: int, total: int, longest: int) -> list[int]:
    """`count` lengths in [1, longest] that add up to `total`, in the proportions of log-normal quantiles."""
    if count == 0:
        return []
    weights = [2.718281828 ** (_SIGMA * NormalDist().inv_cdf((i + 0.5) / count)) for i in range(count)]

    def scaled(factor: float) -> list[int]:
        return [min(longest, max(1, int(weight * factor))) for weight in weights]

    low, high = 0.0, longest / weights[0] + 1
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(scaled(middle)) <= total else (low, middle)
    lengths = scaled(low)
    # Rounding down leaves less than one token a sequence: give them to the longest that still have room.
    for index in reversed(range(count)):
        if sum(lengths) < total and lengths[index] < longest:
            lengths[index] += 1
    return lengths


def auto_workloads(kind: Kind, limit: int | None = None) -> tuple[Workload, ...]:
    """What is measured where nothing was asked for; shorter where the model takes fewer positions.

    Encoders and classifiers: a ragged batch, a full batch and a single sequence. Decoders: a prompt, and
    tokens after a prompt and after a ragged batch of them. Encoder-decoders: the encoder on a ragged batch,
    and tokens for a ragged batch and for a single sequence.

    Args:
        kind: what the model is.
        limit: the longest sequence it takes in tokens, new ones included; None where there is no limit.

    Raises:
        ValueError: a model that decodes takes fewer than two positions.
    """
    most = limit or _AUTO_LENGTH + _AUTO_NEW
    seq = min(_AUTO_LENGTH, most)
    if kind in ("encoder", "classifier"):
        task: Task = "classify" if kind == "classifier" else "encode"
        return (
            Workload(8, seq, 0.47, task=task),
            Workload(8, seq, 1.0, task=task),
            Workload(1, seq, 1.0, task=task),
        )
    if most < 2:
        raise ValueError(f"the model takes {most} position: none is left for a token after a prompt")
    new = min(_AUTO_NEW, most // 2)
    if kind == "decoder":
        prompt = min(_AUTO_LENGTH, most - new)
        return (
            Workload(1, seq, task="prefill"),
            Workload(1, prompt, task="decode", new_tokens=new),
            Workload(4, prompt, 0.6, task="decode", new_tokens=new),
        )
    # Source and new tokens have positions of their own.
    source = min(_AUTO_LENGTH // 2, most)
    return (
        Workload(8, seq, 0.47),
        Workload(8, source, 0.6, task="decode", new_tokens=new),
        Workload(1, source, task="decode", new_tokens=new),
    )


def maximum_positions(model: torch.nn.Module) -> int | None:
    """The longest sequence the model takes in tokens, or None where it has no such limit."""
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        # RoBERTa's table starts after its padding row: two of its 514 positions are never a token's.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return limit - int(module.padding_idx) - 1
    return limit
