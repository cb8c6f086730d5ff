"""A clock that moves only when a contender runs; and one thread, which is all that small models need."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fastattn.bench import Contender


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
        spec.loader.exec_module(module)
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

    def sample(self, run: Callable[[], Any], calls: int) -> tuple[float, float, float | None, Any]:
        before = self.seconds
        for _ in range(calls):
            output = run()
        wall = self.seconds - before
        return wall, 2 * wall, None, output

    def contender(self, name: str, *costs_s: float, output: Any = None, **options: Any) -> Contender:
        """A contender whose calls cost these seconds in turn."""
        costs: Iterator[float] = cycle(costs_s)

        def run() -> Any:
            self.calls.append(name)
            self.seconds += next(costs)
            return output

        return Contender(name, run, **options)
