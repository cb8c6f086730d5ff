"""What tuning found: choices, and the measurements behind them, as plain values of a JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from fastattn.packing import PackingThreshold
from fastattn.report import format_table
from fastattn.tuning.machine import Machine

if TYPE_CHECKING:
    from fastattn.bench.rows import Row

__all__ = ["PRECISIONS", "Comparison", "Tuning"]

PRECISIONS = ("fp32", "bf16", "int8")
_BACKENDS = ("triton", "torch")


@dataclass(frozen=True)
class Comparison:
    """One question put to the machine, and its answer.

    Attributes:
        question: "packing", "backend", "precision", "threads" or "multiple".
        case: what was run, in words.
        chosen: the name of the contender that is to be used.
        contenders: of each its "name", "status", "median_ms", "ratio" (over the first, with its interval) and
            "error" (of the output's scale); None where it has none, and then a "reason".
    """

    question: str
    case: str
    chosen: str
    contenders: tuple[dict[str, Any], ...] = ()

    @classmethod
    def of(cls, question: str, case: str, chosen: str, rows: list[Row]) -> Comparison:
        return cls(question, case, chosen, tuple(_plain(row) for row in rows))


def _plain(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "status": row.status,
        "median_ms": row.median_ms,
        "ratio": None if row.ratio is None else row.ratio.to_dict(),
        "error": None if row.parity is None else row.parity.to_dict()["relative_error"],
        "reason": row.reason,
    }


@dataclass(frozen=True)
class Tuning:
    """What was measured on one machine, and what follows.

    Attributes:
        machine: where.
        measured_utc: when, "2026-01-31 12:00".
        fills: as `PackingThreshold.fills`. The one choice that `optimize(mode="auto")` applies.
        backends: operation to "triton" or "torch".
        precision: the fastest of PRECISIONS for linears.
        precision_ratio, precision_error: what it gains over fp32, and its error of the output's scale.
        threads: the number for torch.set_num_threads, for "small" and "large" batches; empty on a GPU.
        default_threads: torch's own choice, when it was measured.
        load_average: of the minute before; choices made on a busy machine may be wrong.
        multiple: what the number of tokens is best rounded up to; 1 where nothing is gained.
        comparisons: the measurements.

    Raises:
        ValueError: a choice that is none of those accepted.
    """

    machine: Machine
    measured_utc: str
    fills: tuple[tuple[int, float], ...] = ()
    backends: Mapping[str, str] = field(default_factory=dict)
    precision: str = "fp32"
    precision_ratio: float | None = None
    precision_error: float | None = None
    threads: Mapping[str, int] = field(default_factory=dict)
    default_threads: int | None = None
    load_average: float | None = None
    multiple: int = 1
    comparisons: tuple[Comparison, ...] = ()

    def __post_init__(self) -> None:
        PackingThreshold(self.machine.device, self.fills)
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}; it must be one of {', '.join(PRECISIONS)}")
        for operation, backend in self.backends.items():
            if backend not in _BACKENDS:
                raise ValueError(
                    f"backend of {operation} is {backend!r}; it must be one of {', '.join(_BACKENDS)}"
                )
        for name, count in {"multiple": self.multiple, **self.threads}.items():
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}; it must be an integer of 1 or more")

    @property
    def threshold(self) -> PackingThreshold:
        """From which fill on padding="auto" is to run padded."""
        return PackingThreshold(self.machine.device, self.fills)

    def applied(self) -> list[str]:
        """What `optimize(mode="auto")` does because of this, in words; empty where it does as it would
        without.
        """
        padded = [f"{fill:.0%} fill at {positions:,} tokens" for positions, fill in self.fills if fill < 1]
        if not padded:
            return []
        return [f"a batch runs padded, not packed, from {', '.join(padded)} on"]

    def advice(self) -> list[str]:
        """What the user may do, in words: nothing of it is done unasked."""
        found = []
        if self.precision != "fp32":
            gain = (
                "faster" if self.precision_ratio is None else f"{self.precision_ratio:.1f}x as fast as fp32"
            )
            error = "" if self.precision_error is None else f", error {self.precision_error:.1%} of the scale"
            how = {
                "bf16": "model.to(torch.bfloat16)",
                "int8": 'fastattn.export(model, folder, precision="int8")',
            }[self.precision]
            found.append(f"linears run {gain} in {self.precision} here{error}: {how}")
        for size, count in self.threads.items():
            if count != self.default_threads:
                found.append(f"{size} batches run fastest here with torch.set_num_threads({count})")
        if self.multiple > 1:
            found.append(
                f"numbers of tokens that are multiples of {self.multiple} run faster here: "
                f"tokenizer(..., pad_to_multiple_of={self.multiple})"
            )
        slower = [name for name, backend in self.backends.items() if backend == "torch"]
        if self.machine.device == "cuda" and slower:
            found.append(
                f"PyTorch is faster than the kernels here at {', '.join(slower)}: "
                'fastattn.set_backend("torch") runs everything in PyTorch'
            )
        return found

    def table(self) -> str:
        """Every comparison, a line a contender, the chosen one marked; then what is applied and advised."""
        rows = [
            (
                each.question,
                each.case,
                row["name"],
                "" if row["median_ms"] is None else f"{row['median_ms']:.3g}",
                "" if row["ratio"] is None else f"{row['ratio']['value']:.2f}x",
                "" if row["error"] is None else f"{float(row['error']):.0e}",
                "chosen" if row["name"] == each.chosen else row["reason"],
            )
            for each in self.comparisons
            for row in each.contenders
        ]
        parts = [format_table(("question", "case", "contender", "ms", "ratio", "error", ""), rows)]
        parts += [f"applied by optimize(): {line}" for line in self.applied() or ["nothing"]]
        parts += [f"advice: {line}" for line in self.advice()]
        return "\n".join([f"{self.machine.key}\nmeasured {self.measured_utc} UTC\n", *parts])

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "backends": dict(self.backends), "threads": dict(self.threads)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Tuning:
        """The inverse of `to_dict`, after JSON.

        Raises:
            ValueError, TypeError, KeyError: `values` is not what `to_dict` gives.
        """
        given = dict(values)
        given["machine"] = Machine(**given["machine"])
        given["fills"] = tuple((int(positions), float(fill)) for positions, fill in given["fills"])
        given["comparisons"] = tuple(
            Comparison(**{**each, "contenders": tuple(each["contenders"])}) for each in given["comparisons"]
        )
        return cls(**given)
