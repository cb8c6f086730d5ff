"""What this machine can do at most, measured on the spot: memory bandwidth and arithmetic by dtype."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastattn.bench.contenders.source import DTYPES

__all__ = ["Ceilings", "measure_ceilings"]

_MIB = 2**20
# Twice the last cache is swept, within these bounds: a virtual machine names the whole socket's cache (480
# MiB for two cores) though it has no such share of it, and takes 2 s to touch a fresh GiB.
_SWEEP_BYTES = (256 * _MIB, 512 * _MIB)
# Edges of the square products. Small ones first: they tell whether a larger one fits the budget. The best of
# them counts: AMX is fastest where the matrices still lie in the second-level cache, a GPU where it is full.
_EDGES = {"cpu": (256, 512, 1024, 2048, 4096), "cuda": (1024, 4096, 8192)}
_MEMORY_SHARE = 0.4


@dataclass(frozen=True)
class Ceilings:
    """The most that was reached here.

    Attributes:
        device: "cpu" or "cuda".
        threads: PyTorch used; 0 on a GPU.
        read_bytes_per_s: reading an array larger than the last cache.
        copy_bytes_per_s: copying one half of it to the other: bytes read plus bytes written.
        flop_per_s: floating-point (or integer) operations a second of a large matrix product, by dtype:
            "fp32", "bf16", "fp16", "int8". A multiplication and an addition count as two.
    """

    device: str
    threads: int
    read_bytes_per_s: float
    copy_bytes_per_s: float
    flop_per_s: dict[str, float]

    @property
    def bytes_per_s(self) -> float:
        """The roof for memory: the faster of the two."""
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def measure_ceilings(
    device: str = "cpu", dtypes: Sequence[str] = ("fp32", "bf16", "int8"), budget_s: float = 2.0
) -> Ceilings:
    """Measure them with all threads PyTorch uses, as settings such as TF32 are now; the best repeat counts.

    Args:
        device: "cpu" or "cuda", with or without an index.
        dtypes: "fp32", "bf16", "fp16" or "int8" (`torch._int_mm`). One that this device has no product for is
            left out of the answer.
        budget_s: seconds to repeat for. Touching the memory first comes on top, and what is slow still runs
            twice.

    Raises:
        ValueError: another dtype or device.
    """
    kind = device.partition(":")[0]
    if kind not in _EDGES:
        raise ValueError(f"device is {device!r}; ceilings are measured on {' or '.join(_EDGES)}")
    known = [*DTYPES, "int8"]
    if unknown := [name for name in dtypes if name not in known]:
        raise ValueError(f"dtype is {unknown[0]!r}; it must be one of {', '.join(known)}")
    with torch.inference_mode():
        read, copy = _bandwidths(device, _MEMORY_SHARE * budget_s)
        share = (1 - _MEMORY_SHARE) * budget_s / max(1, len(dtypes))
        flops = {name: _flop_per_s(device, name, _EDGES[kind], share) for name in dtypes}
    threads = torch.get_num_threads() if kind == "cpu" else 0
    return Ceilings(kind, threads, read, copy, {name: flop for name, flop in flops.items() if flop})


def _bandwidths(device: str, budget_s: float) -> tuple[float, float]:
    """Bytes a second of reading and of copying: of the best piece of the sweep.

    A piece on a CPU takes milliseconds, so that one of them goes undisturbed on a busy machine, and the
    others pushed it out of the cache since it was last read. A GPU is given the whole at once.
    """
    least, most = _SWEEP_BYTES
    size = min(most, max(least, 2 * _last_cache_bytes(device)))
    pieces = torch.ones(size // 4, device=device).chunk(1 if device.startswith("cuda") else 16)
    ones = torch.ones(1024, device=device)
    # Which reduction is fastest differs between BLAS libraries.
    readers: list[Callable[[Tensor], Any]] = [
        lambda piece: torch.dot(*piece.chunk(2)),
        lambda piece: piece.view(-1, 1024).mv(ones),
        torch.linalg.vector_norm,
    ]

    def copy(piece: Tensor) -> Tensor:
        source, target = piece.chunk(2)
        return target.copy_(source)

    def best(works: Sequence[Callable[[Tensor], Any]]) -> float:
        # 3 and 16 have no common factor: every reader comes to every piece.
        runs = [partial(works[i % len(works)], pieces[i % len(pieces)]) for i in range(16 * len(works))]
        return pieces[0].nbytes / _best_s(runs, device, budget_s / 2)

    return best(readers), best([copy])


def _last_cache_bytes(device: str) -> int:
    """Size of the largest cache, as the system tells it; 0 where it does not."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(
        (int(size[:-1]) * 1024 for size in sizes if size[:-1].isdigit() and size[-1] == "K"), default=0
    )


def _flop_per_s(device: str, dtype: str, edges: Sequence[int], budget_s: float) -> float:
    """Of the best square product; 0 where there is none for this dtype."""
    begin, best = time.perf_counter(), 0.0
    rates: dict[Callable[[], Tensor], tuple[float, int]] = {}
    for edge in edges:
        flop = 2 * edge**3
        # Products of 0.1 ms wait for their threads on a busy machine: their pace says little of the next.
        if best and flop / best > budget_s / (1 if edge <= 1024 else 4):
            break
        for product in _products(device, dtype, edge):
            try:
                rates[product] = flop / _best_s([product], device, budget_s / 20), flop
            except RuntimeError:  # not in this dtype, or not laid out like this
                continue
            best = max(best, rates[product][0])
    # What is left of the budget goes to those in the running, in turn: a busy spell then meets them all.
    running = [(product, flop) for product, (rate, flop) in rates.items() if rate > best / 2]
    while running and time.perf_counter() - begin < budget_s:
        best = max(best, *(flop / _seconds(product, device) for product, flop in running))
    return best


def _products(device: str, dtype: str, edge: int) -> list[Callable[[], Tensor]]:
    """The product of two square matrices, the second as it lies and transposed: libraries prefer either."""
    # A generator of its own: measuring must not move the user's.
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randint(-127, 128, (2, edge, edge), dtype=torch.int8, device=device, generator=generator)
    if dtype == "int8":
        left, right = values
        return [lambda: torch._int_mm(left, right), lambda: torch._int_mm(left, right.t())]
    left, right = values.to(DTYPES[dtype]) / 127
    return [lambda: left @ right, lambda: left @ right.t()]


def _best_s(runs: Sequence[Callable[[], Any]], device: str, budget_s: float) -> float:
    """Seconds of the fastest of calls that take turns while the budget lasts: each warms up, and then runs at
    least once.
    """
    for run in runs:
        run()
    begin = time.perf_counter()
    best = min(_seconds(run, device) for run in runs)
    while time.perf_counter() - begin < budget_s:
        best = min(best, *(_seconds(run, device) for run in runs))
    return best


def _seconds(run: Callable[[], Any], device: str) -> float:
    if not device.startswith("cuda"):
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
