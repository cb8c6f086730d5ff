"""OpenVINO on the CPU, by its own converter of PyTorch models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastattn.bench.contenders.quiet import quiet
from fastattn.bench.contenders.requirements import require_cpu, require_packages
from fastattn.bench.contenders.runner import Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.contenders.traced import Traced
from fastattn.bench.timing import MissingError
from fastattn.processor import cpu_flags

__all__ = ["build"]

# Left to itself OpenVINO computes in bf16 wherever the processor has it.
_HINTS = {"fp32": "f32", "bf16": "bf16"}


def build(source: Source, precision: str, stages: Stages) -> Runner:
    """`openvino.convert_model`, compiled for latency in the stated precision.

    Raises:
        MissingError: openvino is not installed, the benchmark does not run on the CPU, or the processor has
            no bf16.
    """
    require_packages("openvino")
    require_cpu(source, "OpenVINO")
    if precision == "bf16" and not cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"}:
        raise MissingError("bf16 on this processor: a CPU with AVX512-BF16, AMX or Arm's BF16")
    import openvino

    traced = Traced(source)
    with stages("convert"), quiet():
        converted = openvino.convert_model(traced.module, example_input=traced.example)
    options = {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    with stages("compile"):
        compiled: Any = openvino.Core().compile_model(converted, "CPU", options)
    runner = OpenVinoModel(compiled, traced.inputs, traced.outputs)
    source.resources.callback(runner.close)
    return runner


class OpenVinoModel(Runner):
    """A compiled model that takes a batch and gives named outputs."""

    def __init__(self, compiled: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        self._compiled, self._inputs, self._outputs = compiled, inputs, outputs

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = self._compiled([inputs[name].numpy() for name in self._inputs])
        return {name: torch.from_numpy(found[index]) for index, name in enumerate(self._outputs)}

    def close(self) -> None:
        """Let go of the compiled model."""
        self._compiled = None
