"""FLOP, bytes and time of every operation of a call, as PyTorch dispatches them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from fastattn.bench.contenders.source import DTYPES
from fastattn.bench.op_work import bytes_of, flop_of, is_free, named_arguments, tensors_in

__all__ = ["OpCost", "count"]

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class OpCost:
    """All calls of one operation with the same shapes and dtype, together.

    Attributes:
        op: as registered, such as "aten.addmm" or "fastattn.attention".
        shapes: of its tensor arguments, such as "[768], [1024, 768], [768, 3072]".
        dtype: of the first floating-point tensor, else of the first tensor: "fp32", "bf16", "fp16", or
            PyTorch's name, such as "int8".
        calls: how many there were.
        flop: floating-point operations of all calls; 0 where nothing counts them.
        bytes: inputs read once and outputs written once, over all calls.
        time_ms: of all calls, without the cost of dispatching them.
    """

    op: str
    shapes: str
    dtype: str
    calls: int
    flop: float
    bytes: float
    time_ms: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def count(run: Callable[[], Any], device: str = "cpu") -> tuple[OpCost, ...]:
    """Call `run` once and account for every operation that reaches PyTorch's dispatcher on this thread.

    Operations are timed one after another, so on a GPU none overlaps another. What a call to PyTorch from
    here costs by itself is measured first and taken off. Views, and memory taken but not touched, are left
    out: their time is part of what the whole call takes beyond its operations. FLOP and bytes are
    `op_work`'s.

    What a graph replay runs is not seen, and `torch.compile` steps aside: the model is counted uncompiled.

    Args:
        run: what is counted; the modes it needs (`torch.inference_mode`) are its own to enter. Call it once
            before, or the first call's set-up is in the times.
        device: "cpu" or "cuda": chooses the clock.

    Returns:
        One entry an operation, shapes and dtype, in the order of their first calls.

    Example:
        >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
        >>> [cost] = count(lambda: torch.nn.functional.linear(x, weight))
        >>> cost.op, cost.shapes, cost.flop, cost.bytes
        ('aten.mm', '[2, 3], [3, 4]', 48.0, 104.0)
    """
    clock: _Clock = _CudaClock() if device.startswith("cuda") else _CpuClock()
    overhead_s = _overhead_s(clock, device)
    with _Counter(clock) as counter:
        run()
    return tuple(entry.cost(*key, overhead_s) for key, entry in counter.entries.items())


class _Clock(Protocol):
    def time(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        """The call's result, and what gives its seconds: asked after all calls, for that may wait."""
        ...


class _CpuClock:
    def time(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        return result, lambda: seconds


class _CudaClock:
    """Events around a call. The device sleeps first, while the processor queues the call and both events:
    what lies between them is then the device's work alone and not the time to launch it.
    """

    sleep_cycles = 100_000

    def time(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        event: Any = torch.cuda.Event
        start, end = event(enable_timing=True), event(enable_timing=True)
        torch.cuda._sleep(self.sleep_cycles)
        start.record()
        result = call()
        end.record()

        def seconds() -> float:
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return result, seconds


def _overhead_s(clock: _Clock, device: str) -> float:
    """Seconds that an operation without work seems to take."""
    nothing = torch.empty(1, device=device)
    readings = [clock.time(lambda: torch.ops.aten.alias.default(nothing))[1] for _ in range(200)]
    return statistics.median(reading() for reading in readings)


@dataclass
class _Entry:
    calls: int = 0
    flop: float = 0.0
    bytes: float = 0.0
    readings: list[Callable[[], float]] = field(default_factory=list)

    def cost(self, op: str, shapes: str, dtype: str, overhead_s: float) -> OpCost:
        seconds = sum(max(0.0, reading() - overhead_s) for reading in self.readings)
        return OpCost(op, shapes, dtype, self.calls, self.flop, self.bytes, seconds * 1e3)


class _Counter(TorchDispatchMode):
    """Sees every operation below autograd; below inference_mode also those made of others, which it opens."""

    # Else fastattn's layers take it for a tracer and leave out what depends on values: packing, for one.
    fastattn_only_watches = True

    def __init__(self, clock: _Clock) -> None:
        super().__init__()
        self.clock = clock
        self.entries: dict[tuple[str, str, str], _Entry] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_composite(func):
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        result, reading = self.clock.time(lambda: func(*args, **kwargs))
        named = named_arguments(func, args, kwargs)
        if not is_free(func, named, result):
            self._add(func, named, result, reading)
        return result

    def _add(
        self, func: OpOverload, named: dict[str, Any], result: Any, reading: Callable[[], float]
    ) -> None:
        tensors = [tensor for value in named.values() for tensor in tensors_in(value)]
        shapes = ", ".join(map(_shape_text, tensors))
        op = func._schema.name.replace("::", ".")
        entry = self.entries.setdefault((op, shapes, _dtype_name([*tensors, *tensors_in(result)])), _Entry())
        entry.calls += 1
        entry.flop += flop_of(func, named, result)
        entry.bytes += bytes_of(func, named, result)
        entry.readings.append(reading)


@cache
def _is_composite(func: OpOverload) -> bool:
    """Whether PyTorch computes an operation by others. Its C++ does what runs without a mode too; the Python
    decompositions that `OpOverload.decompose` prefers do not: theirs of a dropout in evaluation copies.
    """
    composite = DispatchKey.CompositeImplicitAutograd
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)


def _shape_text(tensor: torch.Tensor) -> str:
    # torch.nn's encoder nests a padded batch in a tensor without a shape.
    return f"nested [{tensor.numel()}]" if tensor.is_nested else str(list(tensor.shape))


def _dtype_name(tensors: list[torch.Tensor]) -> str:
    floating = [tensor.dtype for tensor in tensors if tensor.is_floating_point()]
    dtype = next(iter([*floating, *(tensor.dtype for tensor in tensors)]), None)
    return _DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch.")) if dtype is not None else ""
