"""What the benchmark suites share: devices, and one way to time fastattn against what it replaces.

    pytest benchmarks/ --benchmark-only                            # a table a group: reference and fastattn
    pytest benchmarks/ --benchmark-only --benchmark-histogram      # the same with plots

pytest-benchmark times contenders one after another, and a shared machine drifts in between: the figure to
quote is `extra_info["ratio"]`, from fastattn's own interleaved harness, with its interval.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastattn.bench import Contender, Parity, compare, measure

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="Needs a GPU")],
)
REFERENCE, FASTATTN = "reference", "fastattn"


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[REFERENCE, FASTATTN])
def contender(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def versus(benchmark: Any, device: str, contender: str) -> Callable[..., None]:
    """Times one contender with pytest-benchmark, after both have been compared.

    Called with the group's name and both callables; `mask` says which positions are real, `budget_s` how long
    the interleaved measurement takes. That one runs beside the fastattn row only.
    """

    def run(
        group: str,
        reference: Callable[[], Any],
        fastattn: Callable[[], Any],
        mask: torch.Tensor | None = None,
        budget_s: float = 1.0,
        rounds: int = 20,
    ) -> None:
        with torch.inference_mode():
            expected = reference()

            def check(_: Contender, output: Any) -> Parity:
                return compare(expected, output, mask=mask)

            figure = check(Contender(FASTATTN, fastattn), fastattn())
            assert figure.passed, f"{group}: {figure}"
            benchmark.group = f"{group} [{device}]"
            benchmark.extra_info["max_error_of_scale"] = figure.relative_error
            if contender == FASTATTN:
                pair = [Contender(REFERENCE, reference), Contender(FASTATTN, fastattn)]
                row = measure(pair, check=check, device=device, budget_s=budget_s)[1]
                assert row.ratio is not None, row.reason
                benchmark.extra_info["ratio"] = row.ratio.to_dict()
            chosen = {REFERENCE: reference, FASTATTN: fastattn}[contender]
            benchmark.pedantic(_finished(chosen, device), rounds=rounds, warmup_rounds=1)

    return run


def _finished(run: Callable[[], Any], device: str) -> Callable[[], None]:
    """A call that returns when the device is done."""
    if device == "cpu":
        return run

    def synchronized() -> None:
        run()
        torch.cuda.synchronize()

    return synchronized
