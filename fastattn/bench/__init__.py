"""Measuring: contenders interleaved in one process, parity beside every time, the environment recorded."""

from fastattn.bench.environment import capture_environment
from fastattn.bench.model_benchmark import benchmark
from fastattn.bench.parity import FP32_TOLERANCE, Parity, compare
from fastattn.bench.ratio import Ratio, paired_ratio
from fastattn.bench.report import Report
from fastattn.bench.result import BenchmarkResult, Measurement
from fastattn.bench.rows import Row
from fastattn.bench.timing import Contender, Interrupted, MissingError, Prepared, measure
from fastattn.bench.workloads import Workload, auto_workloads

__all__ = [
    "FP32_TOLERANCE",
    "BenchmarkResult",
    "Contender",
    "Interrupted",
    "Measurement",
    "MissingError",
    "Parity",
    "Prepared",
    "Ratio",
    "Report",
    "Row",
    "Workload",
    "auto_workloads",
    "benchmark",
    "capture_environment",
    "compare",
    "measure",
    "paired_ratio",
]
