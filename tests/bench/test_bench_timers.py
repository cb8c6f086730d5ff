"""The clocks: what they see of real work, and in which order the GPU's does what."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from fastattn.bench import Contender, measure
from fastattn.bench.timers import CudaTimer


def test_a_real_clock_sees_work() -> None:
    def work() -> int:
        return sum(range(200_000))

    row = measure([Contender("work", work)], budget_s=0.2)[0]
    assert row.min_ms is not None and row.median_ms is not None
    assert 0 < row.min_ms <= row.median_ms
    assert row.cpu_median_ms is not None and row.cpu_median_ms > 0


def test_a_contender_does_not_pay_for_threads_that_the_one_before_left_spinning() -> None:
    """As ONNX Runtime's do: they work on for tens of milliseconds after its call has returned."""

    def spin() -> None:
        end = time.thread_time() + 0.03
        while time.thread_time() < end:
            pass

    def leaves_a_thread_spinning() -> None:
        threading.Thread(target=spin).start()

    # A contender that waits has no processor time of its own.
    contenders = [Contender("spins", leaves_a_thread_spinning), Contender("waits", lambda: time.sleep(0.01))]
    waits = measure(contenders, budget_s=0, min_rounds=9)[1]
    assert waits.cpu_median_ms is not None and waits.cpu_median_ms < 2.0


class FakeCuda:
    """torch.cuda of a device that takes 2 ms a call, flushes in 1 ms, and notes what it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.now_ms = 0.0
        cuda = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                cuda.log.append("event")
                self.at_ms = cuda.now_ms

            def elapsed_time(self, end: Event) -> float:
                assert cuda.log[-1] == "wait"
                return end.at_ms - self.at_ms

        def synchronize() -> None:
            self.log.append("wait")

        def flush() -> None:
            self.log.append("flush")
            self.now_ms += 1.0

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
        monkeypatch.setattr(torch, "empty", lambda *size, **options: SimpleNamespace(zero_=flush))

    def run(self) -> str:
        self.log.append("call")
        self.now_ms += 2.0
        return "output"


def test_device_time_lies_between_two_events_and_ends_with_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    sample = CudaTimer().sample(cuda.run, 3)
    assert cuda.log == ["wait", "event", "call", "call", "call", "event", "wait"]
    assert sample.device_s == pytest.approx(0.006) and sample.output == "output"
    assert sample.wall_s < 1.0


def test_with_a_cold_cache_each_call_is_flushed_before_and_timed_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = FakeCuda(monkeypatch)
    sample = CudaTimer(flush_l2=True).sample(cuda.run, 2)
    assert cuda.log == ["wait", *["flush", "event", "call", "event", "wait"] * 2]
    assert sample.device_s == sample.wall_s == pytest.approx(0.004)
