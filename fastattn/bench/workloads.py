"""What is run: batches of tokens whose lengths are spread as real text's are, to a stated fill."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["Workload", "auto_workloads", "maximum_positions"]

# Sentence lengths in running text are close to log-normal; this is the standard deviation of the logarithm.
_SIGMA = 0.6


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
    """

    batch: int = 8
    seq: int = 128
    fill: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "seq"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of 1 or more")
        if isinstance(self.fill, bool) or not isinstance(self.fill, int | float) or not 0 < self.fill <= 1:
            raise ValueError(
                f"fill is {self.fill!r}; it must be a fraction above 0 and at most 1, such as 0.47"
            )

    def __str__(self) -> str:
        return f"batch {self.batch} x {self.seq}, {self.fill:.0%} fill"

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


def auto_workloads(max_positions: int | None = None) -> tuple[Workload, ...]:
    """A ragged batch, a full batch and a single sequence, of 128 tokens or the most the model takes."""
    seq = min(128, max_positions or 128)
    return Workload(8, seq, 0.47), Workload(8, seq, 1.0), Workload(1, seq, 1.0)


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
