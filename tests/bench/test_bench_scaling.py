"""Curves through points: coefficients that were put in come out, and points that fail are told apart."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from fastattn.bench.rows import Row
from fastattn.bench.scaling import INTERRUPTED, Scaling, fit, scaling
from fastattn.bench.workloads import Workload

BASE = Workload(batch=2, seq=64, fill=1.0)
LENGTHS = (16, 32, 64, 128, 256, 512)


def measured(name: str, milliseconds: float, peak: int | None = None, device: int | None = None) -> Row:
    times = tuple(milliseconds * factor for factor in (0.9, 1.0, 1.0, 1.0, 1.2))
    return Row(name, "fp32", "measured", wall_ms=times, peak_host_bytes=peak, peak_device_bytes=device)


def quadratic(workload: Workload) -> Sequence[Row]:
    n = workload.seq
    return measured("eager", 3 + 0.5 * n + 0.01 * n * n, 1000 + 8 * n * n), measured(
        "ours", 2 + 0.25 * n, 4096
    )


@pytest.mark.parametrize(
    "coefficients",
    [(3.0, 0.5, 0.01), (0.0, 0.5, 0.01), (3.0, 0.0, 0.01), (3.0, 0.5, 0.0), (7.0, 0.0, 0.0), (0.0, 0.0, 2.0)],
)
def test_a_fit_finds_the_coefficients_that_were_put_in(coefficients: tuple[float, float, float]) -> None:
    a, b, c = coefficients
    found = fit([(n, a + b * n + c * n * n) for n in LENGTHS], 2)
    assert found is not None and found.formula == "a + b n + c n^2"
    assert list(found.coefficients.values()) == pytest.approx(coefficients, abs=1e-8)
    assert found.at(100) == pytest.approx(a + 100 * b + 10000 * c)
    if b or c:
        assert found.r2 == pytest.approx(1.0)


def test_noise_of_a_few_percent_leaves_the_coefficients_where_they_are() -> None:
    noise = np.random.default_rng(0).normal(1, 0.03, len(LENGTHS))
    found = fit([(n, (3 + 0.5 * n + 0.01 * n * n) * f) for n, f in zip(LENGTHS, noise, strict=True)], 2)
    assert found is not None and found.r2 is not None and 0.98 < found.r2 < 1
    assert found.coefficients == {
        "a": pytest.approx(3, rel=0.5),
        "b": pytest.approx(0.5, rel=0.15),
        "c": pytest.approx(0.01, rel=0.1),
    }


def test_small_values_count_as_much_as_large_ones() -> None:
    # By absolute error the constant would drown in the last point's 1%.
    points = [(n, 10 + 1e-3 * n * n) for n in LENGTHS]
    points[-1] = (512, points[-1][1] * 1.01)
    found = fit(points, 2)
    assert found is not None and found.coefficients["a"] == pytest.approx(10, rel=0.02)


def test_coefficients_are_never_negative() -> None:
    # Falls at first, as times do where more threads set in: the nearest polynomial would begin at -1.
    found = fit([(1, 5.0), (2, 4.0), (3, 5.0), (4, 8.0)], 2)
    assert found is not None and min(found.coefficients.values()) >= 0
    falling = fit([(1, 3.0), (2, 2.0), (3, 1.0)], 1)
    assert falling is not None and falling.coefficients["b"] == 0 and falling.r2 == pytest.approx(0.0)


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5, 2.0])
def test_the_exponent_is_that_of_the_upper_half(power: float) -> None:
    # The lower half is flat: a call's fixed costs.
    found = fit([(n, max(n, 128) ** power) for n in LENGTHS], 2)
    assert found is not None and found.exponent == pytest.approx(power)


def test_few_points_say_less() -> None:
    assert fit([], 2) is None and fit([(1, 1.0)], 2) is None
    two = fit([(1, 3.0), (2, 5.0)], 2)
    assert two is not None and two.formula == "a + b n" and two.r2 is None
    assert two.coefficients == pytest.approx({"a": 1.0, "b": 2.0})
    three = fit([(1, 1.0), (2, 4.0), (3, 9.0)], 2)
    assert three is not None and three.r2 is None and three.exponent == pytest.approx(2.0)


def test_every_contender_has_a_curve_of_its_time_and_memory() -> None:
    found = scaling("length", LENGTHS, quadratic, BASE)
    assert found.axis == "length" and found.fixed == {"batch": 2, "fill": 1.0} and not found.interrupted
    eager, ours = found.curves
    assert [point.value for point in eager.points] == list(LENGTHS)
    assert eager.time_fit is not None and eager.memory_fit is not None and ours.time_fit is not None
    assert eager.time_fit.coefficients == pytest.approx({"a": 3, "b": 0.5, "c": 0.01})
    assert eager.memory_fit.coefficients == pytest.approx({"a": 1000, "b": 0, "c": 8}, abs=1e-6)
    assert ours.time_fit.coefficients == pytest.approx({"a": 2, "b": 0.25, "c": 0}, abs=1e-9)
    point = ours.points[0]
    assert point.median_ms == pytest.approx(6) and point.low_ms is not None and point.high_ms is not None
    assert 5.4 <= point.low_ms < 6 < point.high_ms <= 7.2
    json.dumps(found.to_dict(), allow_nan=False)


def test_batch_and_fill_change_what_they_name_and_are_fitted_by_a_line() -> None:
    seen: list[Workload] = []

    def note(workload: Workload) -> Sequence[Row]:
        seen.append(workload)
        return [measured("ours", 1 + 2 * workload.batch + 4 * workload.fill, 500, 300)]

    by_batch = scaling("batch", [1, 2, 8], note, BASE)
    by_fill = scaling("fill", [0.25, 0.5, 1.0], note, BASE)
    assert [each.batch for each in seen] == [1, 2, 8, 2, 2, 2]
    assert [each.fill for each in seen] == [1.0, 1.0, 1.0, 0.25, 0.5, 1.0]
    batch_fit, fill_fit = by_batch.curves[0].time_fit, by_fill.curves[0].time_fit
    assert batch_fit is not None and batch_fit.coefficients == pytest.approx({"a": 5, "b": 2})
    assert fill_fit is not None and fill_fit.coefficients == pytest.approx({"a": 5, "b": 4})
    # What the device holds is what limits it.
    assert {point.peak_bytes for point in by_batch.curves[0].points} == {300}


def stops_at(length: int, error: BaseException) -> Callable[[Workload], Sequence[Row]]:
    def measure_one(workload: Workload) -> Sequence[Row]:
        if workload.seq == length:
            raise error
        return quadratic(workload)

    return measure_one


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            torch.OutOfMemoryError("tried to allocate 3 GiB\nsee the manual"),
            "out of memory: tried to allocate 3 GiB",
        ),
        (MemoryError(), "out of memory: no message"),
        (RuntimeError("no kernel"), "RuntimeError: no kernel"),
    ],
)
def test_a_workload_that_fails_is_a_point_with_its_reason_and_the_rest_goes_on(
    error: Exception, reason: str
) -> None:
    found = scaling("length", LENGTHS, stops_at(128, error), BASE)
    for curve in found.curves:
        assert [point.reason for point in curve.points] == ["", "", "", reason, "", ""]
        assert curve.points[3].median_ms is None and curve.time_fit is not None
    fitted = found.curves[0].time_fit
    assert fitted is not None and fitted.coefficients == pytest.approx({"a": 3, "b": 0.5, "c": 0.01})


def test_a_row_that_fails_leaves_the_other_contenders_curve_whole() -> None:
    def measure_one(workload: Workload) -> Sequence[Row]:
        eager, ours = quadratic(workload)
        if workload.seq > 128:
            eager = Row("eager", "fp32", "failed", reason="out of memory: 9 GiB")
        return eager, ours

    eager, ours = scaling("length", LENGTHS, measure_one, BASE).curves
    assert [point.reason for point in eager.points[3:]] == [
        "",
        "out of memory: 9 GiB",
        "out of memory: 9 GiB",
    ]
    assert all(point.median_ms for point in ours.points)


def test_ctrl_c_keeps_what_was_measured() -> None:
    found: Scaling = scaling("length", LENGTHS, stops_at(128, KeyboardInterrupt()), BASE)
    assert found.interrupted and found.to_dict()["interrupted"]
    for curve in found.curves:
        assert [point.reason for point in curve.points] == ["", "", ""] + [INTERRUPTED] * 3
        assert [point.value for point in curve.points] == list(LENGTHS)
        assert curve.time_fit is not None


@pytest.mark.parametrize(
    ("axis", "values", "message"),
    [
        ("width", [1], "axis is 'width'; it must be one of length, batch, fill"),
        ("length", [], "there must be one or more"),
        ("length", [16, 16], "each once"),
        ("length", [16, 0], "seq is 0"),
        ("batch", [1.5], "batch is 1.5"),
        ("fill", [0.5, 1.5], "fill is 1.5"),
    ],
)
def test_bad_values_are_refused_before_anything_is_measured(
    axis: str, values: list[float], message: str
) -> None:
    def never(workload: Workload) -> Sequence[Row]:
        raise AssertionError("measured")

    with pytest.raises(ValueError, match=message):
        scaling(axis, values, never, BASE)
