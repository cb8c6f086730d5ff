"""A speed-up taken apart: chains of rows, what a missing row does to them, and how they multiply."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from fastattn.bench.attribution import Attribution, attributions
from fastattn.bench.parity import Parity
from fastattn.bench.ratio import MINIMUM_ROUNDS
from fastattn.bench.result import Measurement
from fastattn.bench.rows import Row
from fastattn.bench.workloads import Workload

WORKLOAD = Workload(batch=4, seq=32, fill=0.5)
RIGHT = Parity(max_abs_error=1e-7, scale=1.0, tolerance=1e-4)
# The machine's speed over eight rounds: it slows down to a half and everyone with it.
DRIFT = (1.0, 1.0, 1.1, 1.3, 1.6, 2.0, 2.0, 1.5)


def row(name: str, milliseconds: float, **options: object) -> Row:
    times = tuple(milliseconds * factor for factor in DRIFT)
    values: dict[str, object] = {"status": "measured", "wall_ms": times, "parity": RIGHT, **options}
    return Row(name, name.split()[-1], **values)  # type: ignore[arg-type]


def unmeasured(name: str, status: str, reason: str) -> Row:
    return row(name, 0, status=status, reason=reason, wall_ms=(), parity=None)


CPU_ROWS = (
    row("eager fp32", 20.0),
    row("SDPA fp32", 12.0, baseline=True),
    row("fastattn padded fp32", 10.0),
    row("fastattn fp32", 5.0),
    row("fastattn bf16", 2.0),
    row("fastattn ONNX fp32", 4.0),
    row("fastattn ONNX int8", 1.0),
)


def chains(*rows: Row) -> dict[str, Attribution]:
    return {each.path: each for each in attributions(Measurement(WORKLOAD, rows))}


def without(name: str, instead: Row | None = None) -> tuple[Row, ...]:
    rows = [instead if each.name == name else each for each in CPU_ROWS]
    return tuple(each for each in rows if each is not None)


def factors(attribution: Attribution) -> dict[str, float | None]:
    return {step.name: round(step.ratio.value, 9) if step.ratio else None for step in attribution.steps}


def test_each_step_is_over_the_row_before_it_whatever_the_machine_did_meanwhile() -> None:
    found = chains(*CPU_ROWS)
    assert factors(found["PyTorch"]) == {"kernels": 1.2, "padding removal": 2.0, "precision bf16": 2.5}
    assert factors(found["ONNX Runtime"]) == {
        "kernels": 1.2,
        "padding removal": 2.0,
        "graph": 1.25,
        "precision int8": 4.0,
    }
    steps = found["ONNX Runtime"].steps
    assert [step.over for step in steps] == ["SDPA fp32", *(step.contender for step in steps[:-1])]
    assert all(step.ratio is not None and step.ratio.baseline == step.over for step in steps)


def test_total_is_the_end_over_the_start() -> None:
    attribution = chains(*CPU_ROWS)["PyTorch"]
    assert attribution.start == "SDPA fp32"
    assert attribution.total is not None and attribution.total.value == pytest.approx(6.0)
    assert attribution.total.baseline == "SDPA fp32"
    assert attribution.start_ms == CPU_ROWS[1].median_ms
    assert attribution.end_ms == CPU_ROWS[4].median_ms
    assert attribution.remainder == pytest.approx(1.0)


def test_what_the_steps_do_not_multiply_to_is_shown_as_a_remainder() -> None:
    # Each step is 2 in four rounds of seven and 1 in the others; in six rounds it is one of them, never none.
    rows = (
        row("SDPA fp32", 1.0, wall_ms=(2.0, 2.0, 2.0, 4.0, 2.0, 2.0, 2.0), baseline=True),
        row("fastattn padded fp32", 1.0, wall_ms=(2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0)),
        row("fastattn fp32", 1.0, wall_ms=(1.0,) * 7),
    )
    attribution = chains(*rows)["PyTorch"]
    assert attribution.total is not None and attribution.remainder is not None
    steps = math.prod(step.ratio.value for step in attribution.steps if step.ratio)
    assert attribution.total.value == pytest.approx(steps * attribution.remainder)
    assert (steps, attribution.total.value) == (4.0, 2.0)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("missing", "missing: triton"),
        ("failed", "out of memory: 3 GiB"),
        ("wrong", "wrong answer: 0.1 of the scale"),
    ],
)
def test_a_row_without_times_gives_its_reason_and_the_next_step_holds_both(status: str, reason: str) -> None:
    rows = without("fastattn padded fp32", unmeasured("fastattn padded fp32", status, reason))
    first, second, third = chains(*rows)["PyTorch"].steps
    assert (first.name, first.ratio, first.reason) == ("kernels", None, reason)
    assert second.name == "kernels and padding removal" and second.over == "SDPA fp32"
    assert second.ratio is not None and second.ratio.value == pytest.approx(2.4)
    assert third.name == "precision bf16" and third.over == "fastattn fp32"


def test_a_contender_that_was_not_asked_for_is_named() -> None:
    first, second, _ = chains(*without("fastattn padded fp32"))["PyTorch"].steps
    assert first.ratio is None and first.reason == "fastattn padded fp32 is not among the contenders"
    assert second.name == "kernels and padding removal"


def test_steps_without_rows_of_their_own_are_all_in_the_next() -> None:
    step = chains(CPU_ROWS[1], CPU_ROWS[5])["ONNX Runtime"].steps[-1]
    assert step.name == "kernels, padding removal and graph" and step.over == "SDPA fp32"
    assert step.ratio is not None and step.ratio.value == pytest.approx(3.0)


def test_a_chain_ends_at_the_last_row_that_was_measured() -> None:
    failed = unmeasured("fastattn bf16", "failed", "RuntimeError: no")
    attribution = chains(*without("fastattn bf16", failed))["PyTorch"]
    assert attribution.steps[-1].reason == "RuntimeError: no"
    assert attribution.total is not None and attribution.total.value == pytest.approx(2.4)
    assert attribution.end_ms == CPU_ROWS[3].median_ms


def test_the_start_is_the_faster_untouched_model() -> None:
    rows = (row("eager fp32", 11.0, baseline=True), row("SDPA fp32", 12.0), *CPU_ROWS[2:])
    attribution = chains(*rows)["PyTorch"]
    assert attribution.start == "eager fp32"
    assert factors(attribution)["kernels"] == 1.1


def test_without_a_start_nothing_is_attributed() -> None:
    failed = unmeasured("SDPA fp32", "failed", "RuntimeError: no")
    attribution = chains(failed, *CPU_ROWS[2:])["PyTorch"]
    assert attribution.total is None and attribution.end_ms is None and attribution.remainder is None
    assert {step.reason for step in attribution.steps} == {"RuntimeError: no"}


def test_no_ratio_without_parity_or_with_too_few_rounds() -> None:
    unchecked = chains(*without("fastattn fp32", replace(CPU_ROWS[3], parity=None)))["PyTorch"].steps[1]
    assert unchecked.ratio is None and "parity of fastattn fp32 was not checked" in unchecked.reason
    short = [replace(each, wall_ms=each.wall_ms[: MINIMUM_ROUNDS - 1]) for each in CPU_ROWS]
    attribution = chains(*short)["PyTorch"]
    assert attribution.total is None
    assert {step.reason for step in attribution.steps} == {
        f"no ratio: an interval takes {MINIMUM_ROUNDS} rounds"
    }


def test_paths_and_precisions_are_those_that_were_asked_for() -> None:
    assert list(chains(*CPU_ROWS[:5])) == ["PyTorch"]
    assert list(chains(CPU_ROWS[1], CPU_ROWS[5])) == ["ONNX Runtime"]
    assert chains(CPU_ROWS[1]) == {}
    assert [step.name for step in chains(*CPU_ROWS[:4])["PyTorch"].steps] == ["kernels", "padding removal"]
    # bf16 is not there: fp16 is told instead.
    rows = without("fastattn bf16", unmeasured("fastattn bf16", "missing", "missing: bf16"))
    last = chains(*rows, row("fastattn fp16", 2.5))["PyTorch"].steps[-1]
    assert last.name == "precision fp16" and last.ratio is not None


def test_without_fp32_precision_is_no_step_and_an_export_in_fp32_is_off_the_way() -> None:
    found = chains(
        row("SDPA bf16", 6.0, baseline=True),
        row("fastattn padded bf16", 4.0),
        row("fastattn bf16", 2.0),
        row("fastattn fp16", 1.0),
        row("fastattn ONNX fp32", 1.0),
    )
    assert list(found) == ["PyTorch"]
    assert factors(found["PyTorch"]) == {"kernels": 1.5, "padding removal": 2.0}


def test_a_gpu_has_its_graph_at_the_end() -> None:
    graph = row("fastattn CUDA graph bf16", 1.0)
    on_gpu = [replace(each, device_ms=each.wall_ms) for each in (*CPU_ROWS[:5], graph)]
    steps = chains(*on_gpu)["PyTorch"].steps
    assert [step.name for step in steps] == ["kernels", "padding removal", "precision bf16", "graph"]
    assert steps[-1].ratio is not None and steps[-1].ratio.value == pytest.approx(2.0)
    # On a CPU there are none, and its row says so.
    missing = unmeasured("fastattn CUDA graph bf16", "missing", "missing: a GPU")
    assert [step.name for step in chains(*CPU_ROWS, missing)["PyTorch"].steps][-1] == "precision bf16"


def test_plain_values() -> None:
    plain = json.loads(json.dumps(chains(*CPU_ROWS)["PyTorch"].to_dict(), allow_nan=False))
    assert plain["workload"]["fill"] == 0.5 and plain["path"] == "PyTorch"
    assert plain["steps"][0]["ratio"]["value"] == pytest.approx(1.2)
    assert plain["total"]["level"] == 0.95 and plain["remainder"] == pytest.approx(1.0)
