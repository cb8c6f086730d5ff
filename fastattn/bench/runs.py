"""A run as a comparison needs it: rows by model, workload and contender, out of our JSON or
pytest-benchmark's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.bench.ratio import MINIMUM_ROUNDS
from fastattn.bench.saved import Measured, load_json, measured, workload_name

__all__ = ["Key", "Quantity", "Run", "RunRow", "read_run"]

# 97.5% of a normal distribution lie below as many standard deviations.
_NORMAL_975 = 1.96


@dataclass(frozen=True)
class Key:
    """What makes rows of two runs the same."""

    model: str
    workload: str
    contender: str


@dataclass(frozen=True)
class Quantity:
    """A time in milliseconds or a speed-up, and how sure it is.

    Attributes:
        value: the median.
        samples: one a round; empty where the file has only statistics.
        log_error: standard error of the value's logarithm, where there are no samples; None where it cannot
            be told.
    """

    value: float
    samples: tuple[float, ...] = ()
    log_error: float | None = None

    def draws(self, count: int, seed: int) -> NDArray[np.float64] | None:
        """Medians of `count` bootstrap resamples, or draws from the stated error; None with under six
        rounds.

        The median of n uniform numbers is Beta((n + 1) / 2, (n + 1) / 2) distributed, and the resample's
        median is the sample at that quantile: no resample need be made, whatever the number of rounds.
        """
        generator = np.random.default_rng(seed)
        if self.samples:
            rounds = len(self.samples)
            if rounds < MINIMUM_ROUNDS:
                return None
            quantiles = generator.beta((rounds + 1) / 2, (rounds + 1) / 2, size=count)
            ranks = np.minimum((quantiles * rounds).astype(np.int64), rounds - 1)
            return np.sort(np.asarray(self.samples, dtype=np.float64))[ranks]
        if self.log_error is None:
            return None
        return self.value * np.exp(generator.normal(0.0, self.log_error, size=count))


@dataclass(frozen=True)
class RunRow:
    """One row.

    Attributes:
        status: "measured", "missing", "failed" or "wrong".
        time: milliseconds a call; None where it was not measured.
        speed_ups: times as fast as each other contender of the same rounds, which one being the baseline or
            not; only between rows whose parity passed.
        baseline: the contender that the run's ratios are over; empty where there is none.
        is_baseline: whether it is that one itself.
    """

    status: str
    reason: str
    time: Quantity | None
    speed_ups: Mapping[str, Quantity] = field(default_factory=dict)
    baseline: str = ""
    is_baseline: bool = False


@dataclass(frozen=True)
class Run:
    """All rows of a file.

    Attributes:
        source: "fastattn" or "pytest-benchmark".
        machine: what a time depends on, by its name: "processor", "threads", "GPU", versions.
        warnings: what the file itself warns of.
    """

    source: str
    rows: dict[Key, RunRow]
    machine: dict[str, str]
    warnings: tuple[str, ...] = ()


def read_run(path: str | Path) -> Run:
    """The rows of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, neither ours nor pytest-benchmark's, or a field is missing.
    """
    document = load_json(path)
    try:
        if "benchmarks" in document and "machine_info" in document:
            return _pytest_benchmark(document)
        return _ours(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is neither a result of fastattn nor of pytest-benchmark: {what}") from error


def _ours(document: Mapping[str, Any]) -> Run:
    entries = measured(document)
    rows: dict[Key, RunRow] = {}
    warnings = list(document.get("warnings", ()))
    for each in entries:
        for name, row in each.rows.items():
            key = Key(each.model, workload_name(each.workload), name)
            if key in rows:
                warnings.append(f"{key.model}, {key.workload}, {name} is there twice: the first counts.")
                continue
            rows[key] = _our_row(each, row)
    machine = _our_machine(entries[0].environment, entries[0].device) if entries else {}
    return Run("fastattn", rows, machine, tuple(warnings))


def _our_row(each: Measured, row: Mapping[str, Any]) -> RunRow:
    wall = tuple(row["wall_ms"])
    time = Quantity(float(np.median(wall)), wall) if wall else None
    speed_ups: dict[str, Quantity] = {}
    for name, other in each.rows.items():
        if name == row["name"] or len(other["wall_ms"]) != len(wall) or not _right(row) or not _right(other):
            continue
        # Both times of a round saw the same machine.
        quotients = tuple(over / own for over, own in zip(other["wall_ms"], wall, strict=True))
        speed_ups[name] = Quantity(float(np.median(quotients)), quotients)
    is_baseline = row["name"] == each.baseline
    return RunRow(row["status"], row["reason"], time, speed_ups, each.baseline or "", is_baseline)


def _right(row: Mapping[str, Any]) -> bool:
    return bool(row["wall_ms"] and row["parity"] and row["parity"]["passed"])


def _our_machine(environment: Mapping[str, Any], device: str) -> dict[str, str]:
    cpu, gpu = environment["cpu"], environment["gpu"] or {}
    machine = {
        "device": device,
        "processor": cpu["model"],
        "cores": cpu["usable_cores"],
        "threads": cpu["torch_threads"],
        "GPU": gpu.get("name", "none"),
        "operating system": environment["os"],
        "Python": environment["python"],
        **environment["packages"],
    }
    return {name: str(value) for name, value in machine.items()}


def _pytest_benchmark(document: Mapping[str, Any]) -> Run:
    rows: dict[Key, RunRow] = {}
    baselines: dict[str | None, set[str]] = {}
    for each in document["benchmarks"]:
        if ratio := _ratio(each):
            baselines.setdefault(each["group"], set()).add(ratio["baseline"])
    for each in document["benchmarks"]:
        file, _, name = each["fullname"].partition("::")
        params = {str(value) for value in (each.get("params") or {}).values()}
        is_baseline = bool(params & baselines.get(each["group"], set())) and not _ratio(each)
        rows[Key(file, "", name or each["name"])] = _pytest_row(each, is_baseline)
    info = document["machine_info"]
    cpu = info.get("cpu") or {}
    machine = {
        "processor": cpu.get("brand_raw", ""),
        "cores": cpu.get("count", ""),
        "architecture": info.get("machine", ""),
        "operating system": f"{info.get('system', '')} {info.get('release', '')}",
        "Python": info.get("python_version", ""),
    }
    return Run("pytest-benchmark", rows, {name: str(value) for name, value in machine.items()})


def _ratio(benchmark: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The interleaved ratio that a test of benchmarks/ leaves beside its times."""
    ratio = (benchmark.get("extra_info") or {}).get("ratio")
    return ratio if isinstance(ratio, Mapping) and ratio.get("low", 0) > 0 else None


def _pytest_row(benchmark: Mapping[str, Any], is_baseline: bool) -> RunRow:
    stats = benchmark["stats"]
    samples = tuple(1e3 * seconds for seconds in stats.get("data") or ())
    median = 1e3 * stats["median"]
    time = Quantity(median, samples, None if samples else _log_error(stats))
    speed_ups = {}
    if ratio := _ratio(benchmark):
        error = math.log(ratio["high"] / ratio["low"]) / (2 * _NORMAL_975)
        speed_ups[ratio["baseline"]] = Quantity(ratio["value"], log_error=error)
    return RunRow("measured", "", time, speed_ups, next(iter(speed_ups), ""), is_baseline)


def _log_error(stats: Mapping[str, Any]) -> float | None:
    """Standard error of the median's logarithm from a file's statistics; None with under six rounds.

    1.253 standard deviations over the root of the number of rounds, the standard deviation being that of a
    normal distribution of the same interquartile range: outliers leave it alone (McGill, Tukey and Larsen,
    "Variations of Box Plots", The American Statistician 32(1), 1978).
    """
    if stats["rounds"] < MINIMUM_ROUNDS or stats["median"] <= 0:
        return None
    deviation = stats["iqr"] / 1.349 if stats["iqr"] > 0 else stats["stddev"]
    return float(1.253 * deviation / math.sqrt(stats["rounds"]) / stats["median"])
