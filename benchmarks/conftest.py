"""What the benchmark suites share: devices, and one way to time the rows of a group.

    pytest benchmarks/ --benchmark-only                            # a table a group
    pytest benchmarks/ --benchmark-only --benchmark-histogram      # the same with plots
    pytest benchmarks/ --benchmark-disable                         # every row once, compared, not timed

pytest-benchmark times contenders one after another, and a shared machine drifts in between: the figure to
quote is `extra_info["ratio"]`, from fastattn's own interleaved harness, with its interval.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from fastattn.bench import Contender, MissingError, Parity, compare, measure
from fastattn.bench.parity import FP32_TOLERANCE

# The configurations of every family are the family test's, and exact answers the GPU suite's.
sys.path += [str(Path(__file__).parents[1] / "tests" / each) for each in ("models", "gpu")]

from contenders import BATCH, Randn, precision

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="Needs a GPU")],
)

Check = Callable[[Any, Any], Parity]


@pytest.fixture(params=["cpu", GPU])
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _untuned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What fastattn does unless told otherwise is measured, not what `fastattn tune` chose here."""
    before = os.environ.get("FASTATTN_CACHE")
    os.environ["FASTATTN_CACHE"] = str(tmp_path_factory.mktemp("untuned"))
    yield
    if before is None:
        del os.environ["FASTATTN_CACHE"]
    else:
        os.environ["FASTATTN_CACHE"] = before


@pytest.fixture
def versus(benchmark: Any, device: str, contender: str) -> Callable[..., None]:
    """Times the row `contender` of a group with pytest-benchmark, after its answer was compared.

    Called with the group's name and the group's rows: functions by name, the first of them the baseline, and
    as `peers` functions that make one and may raise MissingError. A peer that is missing or refuses the call
    is skipped with the reason. `mask` says which positions are real, `check` replaces the comparison (of the
    baseline's output with this one's), `budget_s` is how long the interleaved measurement takes.
    """

    def run(
        group: str,
        rows: Mapping[str, Callable[[], Any]],
        peers: Mapping[str, Callable[[], Callable[[], Any]]] | None = None,
        *,
        mask: torch.Tensor | None = None,
        tolerance: float = FP32_TOLERANCE,
        check: Check | None = None,
        budget_s: float = 0.5,
        rounds: int = 10,
    ) -> None:
        baseline = next(iter(rows))
        with torch.inference_mode():
            expected = rows[baseline]()
            chosen, output = _called(contender, rows, peers or {})

            def agrees(_: Contender, found: Any) -> Parity:
                if check is not None:
                    return check(expected, found)
                return compare(expected, found, mask=mask, tolerance=tolerance)

            figure = agrees(Contender(contender, chosen), output)
            assert figure.passed, f"{group}, {contender}: {figure}"
            benchmark.group = f"{group} [{device}]"
            benchmark.extra_info["max_error_of_scale"] = figure.relative_error
            if contender != baseline and benchmark.enabled:
                pair = [Contender(baseline, rows[baseline]), Contender(contender, chosen)]
                row = measure(pair, check=agrees, device=device, budget_s=budget_s)[1]
                assert row.ratio is not None, row.reason
                benchmark.extra_info["ratio"] = row.ratio.to_dict()
            benchmark.pedantic(_finished(chosen, device), rounds=rounds, warmup_rounds=1)

    return run


@pytest.fixture
def compared(versus: Callable[..., None], device: str) -> Callable[..., None]:
    """`versus` with the tolerance of the precision computed in: in bf16 eager formulas round after every
    step.
    """
    dtype = precision(device)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    return lambda *arguments, **named: versus(*arguments, **{"tolerance": tolerance, **named})


@pytest.fixture
def randn(device: str) -> Randn:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, precision(device))


@pytest.fixture
def mask(device: str) -> torch.Tensor:
    """[B, S] of BATCH, true where a position is real."""
    return BATCH.tokens(1000)["attention_mask"].bool().to(device)


def _called(
    contender: str,
    rows: Mapping[str, Callable[[], Any]],
    peers: Mapping[str, Callable[[], Callable[[], Any]]],
) -> tuple[Callable[[], Any], Any]:
    """The row's function and what it answered."""
    if contender in rows:
        return rows[contender], rows[contender]()
    try:
        chosen = peers[contender]()
    except MissingError as error:
        pytest.skip(f"missing: {error}")
    try:
        return chosen, chosen()
    except RuntimeError as error:
        # How SDPA says that a backend does not take these shapes, types or masks on this device.
        pytest.skip(f"{contender} does not run here: {str(error).splitlines()[0]}")


def _finished(run: Callable[[], Any], device: str) -> Callable[[], None]:
    """A call that returns when the device is done."""
    if device == "cpu":
        return run

    def synchronized() -> None:
        run()
        torch.cuda.synchronize()

    return synchronized
