"""Clocks that move only when a contender runs; and one thread, which is all that small models need."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastattn.bench import Contender
from fastattn.bench.timers import Sample


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def load_benchmark() -> Callable[[str], ModuleType]:
    """Loads a script of benchmarks/ as a module."""

    def load(name: str) -> ModuleType:
        path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # A dataclass looks its own module up by name.
        sys.modules[spec.name] = module
        # A script finds its neighbours because its folder is searched first.
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
        return module

    return load


@pytest.fixture
def new_timer() -> Callable[[], FakeTimer]:
    """Makes fake clocks that start at zero."""
    return FakeTimer


class FakeTimer:
    """Each call of a fake contender costs what it says; `calls` is the order in which they ran."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls: list[str] = []

    def now(self) -> float:
        return self.seconds

    def sample(self, run: Callable[[], Any], calls: int) -> Sample:
        before = self.seconds
        for _ in range(calls):
            output = run()
        wall = self.seconds - before
        return Sample(wall, 2 * wall, None, output)

    def contender(self, name: str, *costs_s: float, output: Any = None, **options: Any) -> Contender:
        """A contender whose calls cost these seconds in turn."""
        costs: Iterator[float] = cycle(costs_s)

        def run() -> Any:
            self.calls.append(name)
            self.seconds += next(costs)
            return output

        return Contender(name, run, **options)


@pytest.fixture
def new_noisy_timer() -> Callable[[int], NoisyTimer]:
    """Makes fake clocks of a shared machine, by seed."""
    return NoisyTimer


class NoisyTimer(FakeTimer):
    """A shared machine: its speed drifts by a factor of two, calls jitter by 5%, and one in twenty takes up
    to three times as long.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        # Slow and fast again within half a minute to several, from anywhere.
        self.phase, self.period = self.random.uniform(0, 6.3), self.random.uniform(30.0, 300.0)

    def busy(self, cost_s: float) -> None:
        """Let a call that takes so long on a quiet machine pass."""
        drift = 1.5 + 0.5 * math.sin(self.phase + 6.3 * self.seconds / self.period)
        spike = self.random.uniform(1.5, 3.0) if self.random.random() < 0.05 else 1.0
        self.seconds += cost_s * drift * spike * self.random.lognormvariate(0, 0.05)

    def costing(self, name: str, cost_s: float) -> Contender:
        """A contender whose calls take so long on a quiet machine."""
        return Contender(name, lambda: self.busy(cost_s))
