"""An ONNX graph of someone else's making in ONNX Runtime, at its defaults but for the threads."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastattn.bench.contenders.requirements import require_cpu, require_packages
from fastattn.bench.contenders.runner import Runner
from fastattn.bench.contenders.source import Source

__all__ = ["OrtGraph", "require_onnx", "session_options"]


def require_onnx(source: Source) -> None:
    """Check for what exporting and ONNX Runtime need.

    Raises:
        MissingError: a package is not installed, or the benchmark does not run on the CPU.
    """
    require_packages("onnx", "onnxscript", "onnxruntime", install='"fastattn[onnx]"')
    require_cpu(source, "ONNX Runtime")


def session_options() -> Any:
    """ONNX Runtime's defaults, every graph optimization among them, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return options


class OrtGraph(Runner):
    """One graph that takes a batch and gives named outputs."""

    def __init__(self, file: Path, resources: ExitStack) -> None:
        import onnxruntime

        self._session: Any = onnxruntime.InferenceSession(
            str(file), session_options(), providers=["CPUExecutionProvider"]
        )
        self._inputs = [each.name for each in self._session.get_inputs()]
        self._outputs = [each.name for each in self._session.get_outputs()]
        resources.callback(self._close)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {name: inputs[name].numpy() for name in self._inputs}
        found = self._session.run(None, feeds)
        return {name: torch.from_numpy(each) for name, each in zip(self._outputs, found, strict=True)}

    def _close(self) -> None:
        # Closes the session, and with it the file of the weights.
        self._session = None
