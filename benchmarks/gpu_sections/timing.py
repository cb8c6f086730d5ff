"""Timing on a GPU: events around one call, cold caches, contenders interleaved, measured ceilings."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastattn.bench import Contender, MissingError, Parity, Row, measure
from fastattn.bench.timers import CudaTimer
from gpu_sections.record import Record

OURS = "fastattn"
# gpu.py refuses to time without a GPU; the tests make the cases, small, on the CPU.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Answer:
    """What a contender's output must be, on a part small enough for float64.

    Attributes:
        pick: takes that part of an output.
        exact: the part in float64.
        own: the part as plain PyTorch gives it in the operation's dtype.
    """

    pick: Callable[[Any], Tensor]
    exact: Tensor
    own: Tensor

    def parity(self, output: Any) -> Parity:
        """Held to the library's rule: twice PyTorch's own error plus 2 eps of the largest value."""
        found = self.pick(output)
        scale = self.exact.abs().max().item()
        own = (self.own.double() - self.exact).abs().max().item() / scale
        error = (found.double() - self.exact).abs().max().item()
        return Parity(error, scale, 2 * own + 2 * torch.finfo(found.dtype).eps)


@dataclass(frozen=True)
class Case:
    """Contenders that do the same work.

    Attributes:
        name: unique in all sections; promises name it.
        contenders: what is timed; "fastattn" is ours.
        baselines: names of which the fastest is the ratios' baseline.
        answers: by contender; None under a name that computes nothing, such as a copy. The entry "" is for
            all that have none of their own.
        flops: floating-point operations of the work.
        moved_bytes: bytes that must be read and written at least.
    """

    name: str
    contenders: Sequence[Contender]
    baselines: Sequence[str]
    answers: dict[str, Answer | None]
    flops: float = 0.0
    moved_bytes: float = 0.0

    def check(self, contender: Contender, output: Any) -> Parity:
        """The contender's parity."""
        answer = self.answers.get(contender.name, self.answers[""])
        return Parity(0.0, 1.0, 0.0) if answer is None else answer.parity(output)


@dataclass
class Ceilings:
    """What this GPU reaches here and now.

    Attributes:
        copy_gbps: a large device-to-device copy, bytes read and written, in 1e9 a second.
        gemm_tflops: bf16, 8192 x 8192 x 8192, on random numbers.
    """

    copy_gbps: float
    gemm_tflops: float
    samples_ms: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def measured(cls, timer: CudaTimer, rounds: int = 12) -> Ceilings:
        """Both, the fastest of `rounds` after a warm-up."""
        count = 2**30
        source = torch.randint(256, (count,), dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        left, right = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        samples: dict[str, list[float]] = {}
        for name, run in {"copy": lambda: target.copy_(source), "gemm": lambda: left @ right}.items():
            times = [timer.sample(run, 1).wall_s for _ in range(rounds + 3)][3:]
            samples[name] = [each * 1e3 for each in times]
        copy, gemm = (min(samples[name]) / 1e3 for name in ("copy", "gemm"))
        return cls(2 * count / copy / 1e9, 2 * 8192**3 / gemm / 1e12, samples)


def run_cases(record: Record, cases: Sequence[tuple[str, Callable[[], Case]]], rounds_s: float = 1.5) -> None:
    """Measure each case while time is left; what fails or is left out is an entry with its reason.

    Args:
        record: where entries go.
        cases: names with what makes them, so that memory is taken one case at a time.
        rounds_s: seconds of timed rounds a case.
    """
    timer = CudaTimer(flush_l2=True)
    ceilings = Ceilings.measured(timer)
    record.set(ceilings=vars(ceilings))
    with torch.no_grad():
        for name, make in cases:
            if record.seconds_left < rounds_s + 2:
                record.add({"case": name, "left_out": "the section's time was up", "rows": []})
                record.fail(f"{name}: left out, the section's time was up")
                continue
            # One case's sizes must not make the next one's graphs dynamic.
            torch._dynamo.reset()
            try:
                case = make()
                rows = measure(
                    case.contenders, check=case.check, baseline=case.baselines, device="cuda",
                    budget_s=min(rounds_s, record.seconds_left), min_rounds=7, warmup=4,
                    min_sample_ms=0.0, resources=False, timer=timer,
                )  # fmt: skip
            except Exception as error:
                record.add({"case": name, "left_out": f"{type(error).__name__}: {error}", "rows": []})
                record.fail(f"{name}: {type(error).__name__}: {error}")
                continue
            record.add({"case": name, "rows": [_entry(row, case, ceilings) for row in rows]})
            for row in rows:
                if row.name.startswith(OURS) and row.status != "measured":
                    record.fail(f"{name}: {row.name} {row.status}: {row.reason}")
            del case, rows
            gc.collect()
            torch.cuda.empty_cache()


def _entry(row: Row, case: Case, ceilings: Ceilings) -> dict[str, Any]:
    """The row's plain values with rates, over its median, and their share of the roofline."""
    entry = row.to_dict()
    if row.median_ms:
        seconds = row.median_ms / 1e3
        floor = max(case.flops / ceilings.gemm_tflops / 1e12, case.moved_bytes / ceilings.copy_gbps / 1e9)
        entry |= {
            "tflops": case.flops / seconds / 1e12,
            "gbps": case.moved_bytes / seconds / 1e9,
            "roofline": floor / seconds,
            "of_copy": case.moved_bytes / seconds / 1e9 / ceilings.copy_gbps,
        }
    return entry


def compiled(function: Callable[..., Any], *arguments: Any) -> Callable[[], Callable[[], Any]]:
    """A contender's `prepare`: `function` through torch.compile."""

    def prepare() -> Callable[[], Any]:
        made = torch.compile(function, dynamic=False)
        return lambda: made(*arguments)

    return prepare


def liger(module: str, name: str, *arguments: Any) -> Callable[[], Callable[[], Any]]:
    """A contender's `prepare`: an autograd function of the Liger kernels, where they are installed."""

    def prepare() -> Callable[[], Any]:
        from importlib import import_module

        try:
            function = getattr(import_module(f"liger_kernel.ops.{module}"), name)
        except (ImportError, AttributeError) as error:
            raise MissingError(f"Liger's {name} ({error})") from None
        return lambda: function.apply(*arguments)

    return prepare
