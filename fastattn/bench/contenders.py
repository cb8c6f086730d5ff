"""The ways a model can be run: each an independent copy, so that preparing one never changes another."""

from __future__ import annotations

import copy
import io
import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from fastattn.bench.environment import cpu_flags
from fastattn.bench.timing import MissingError

__all__ = [
    "AUTO",
    "BUILDERS",
    "DTYPES",
    "OURS",
    "UNTOUCHED",
    "Forward",
    "Source",
    "auto_dtypes",
    "copy_of",
    "label",
    "require_cpp_compiler",
]

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Forward = Callable[[Mapping[str, torch.Tensor]], Any]


@dataclass
class Source:
    """The models that contenders are copied from; none of them is the user's own object.

    Attributes:
        fused: the model fastattn is measured on, swapped.
        untouched: the same weights on the original layers, in fp32: the reference.
        sample: a small batch for exporters to trace.
        device: where contenders run.
        resources: closed when the benchmark ends.
    """

    fused: Callable[[], torch.nn.Module]
    untouched: Callable[[], torch.nn.Module]
    sample: dict[str, torch.Tensor]
    device: torch.device
    resources: ExitStack = field(default_factory=ExitStack)

    @cached_property
    def reference(self) -> Forward:
        """Untouched, eager, fp32: what every output is compared with."""
        return _forward(_attention(self, "eager", "fp32"))


def auto_dtypes(device: torch.device) -> tuple[str, ...]:
    """fp32, and bf16 where the device computes it faster: AVX512-BF16, AMX or Arm's BF16 on a CPU."""
    if device.type == "cuda":
        return ("fp32", "bf16") if torch.cuda.is_bf16_supported() else ("fp32", "fp16")
    return ("fp32", "bf16") if cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"} else ("fp32",)


def require_cpp_compiler() -> None:
    """Raise MissingError where torch.compile would find no C++ compiler: asks the lookup it uses itself."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler
    except ImportError:  # a private module: where it has moved, look for the compilers it would look for
        found = any(map(shutil.which, ("g++", "clang++", "cl")))
    else:
        try:
            found = bool(get_cpp_compiler())
        except Exception:
            found = False
    if not found:
        raise MissingError("C++ compiler")


def _forward(model: Callable[..., Any]) -> Forward:
    def forward(inputs: Mapping[str, torch.Tensor]) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return forward


def _attention(source: Source, implementation: str, dtype: str) -> torch.nn.Module:
    model = source.untouched()
    choose = getattr(model, "set_attn_implementation", None)
    if choose is not None:
        choose(implementation)
    return model.to(source.device, DTYPES[dtype])


def _eager(source: Source, dtype: str) -> Forward:
    return source.reference if dtype == "fp32" else _forward(_attention(source, "eager", dtype))


def _sdpa(source: Source, dtype: str) -> Forward:
    return _forward(_attention(source, "sdpa", dtype))


def _compile(source: Source, dtype: str) -> Forward:
    if source.device.type == "cpu":
        require_cpp_compiler()
    # One graph a shape, its best case: by default a second shape would be served by a slower dynamic graph.
    return _forward(torch.compile(_attention(source, "sdpa", dtype), dynamic=False))


def _fastattn(source: Source, dtype: str) -> Forward:
    return _forward(source.fused().to(source.device, DTYPES[dtype]))


def _onnx(source: Source, dtype: str) -> Forward:
    _require_onnx(source, dtype)
    import fastattn

    folder = source.resources.enter_context(tempfile.TemporaryDirectory())
    # Its parity is measured here like everyone's, on the very workload that is timed.
    with redirect_stdout(io.StringIO()):
        fastattn.export(source.fused().to(source.device, DTYPES[dtype]), folder, verify=False)
    session = fastattn.load(folder)
    return lambda inputs: session(**inputs)


def _transformers_onnx(source: Source, dtype: str) -> Forward:
    _require_onnx(source, dtype)
    try:
        from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    except ImportError as error:
        raise MissingError("transformers with exporters (5.14 or later)") from error
    model = _attention(source, "sdpa", dtype)
    # torch.onnx reports its steps on stdout, where `fastattn bench --json` prints its result.
    with redirect_stdout(io.StringIO()):
        config = OnnxConfig(dynamic=True, ort_fusions="cpu")
        exported = OnnxExporter().export(model, source.sample, config=config)
    return lambda inputs: exported(**inputs)


def _require_onnx(source: Source, dtype: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingError(f'{package}: pip install "fastattn[onnx]"')
    if dtype != "fp32":
        raise MissingError(f"{dtype} export: ONNX Runtime multiplies matrices in fp32 on a CPU")
    if source.device.type != "cpu":
        raise MissingError(f"ONNX Runtime on {source.device.type}: exports are measured on the CPU")


# Name -> (label, how it is built). The order is the order of rows.
BUILDERS: dict[str, tuple[str, Callable[[Source, str], Forward]]] = {
    "eager": ("eager", _eager),
    "sdpa": ("SDPA", _sdpa),
    "compile": ("torch.compile", _compile),
    "fastattn": ("fastattn", _fastattn),
    "onnx": ("fastattn ONNX", _onnx),
    "transformers-onnx": ("transformers ONNX", _transformers_onnx),
}
UNTOUCHED = ("eager", "sdpa")
OURS = ("fastattn", "onnx")
AUTO = ("eager", "sdpa", "compile", "fastattn", "onnx")


def label(key: str, dtype: str) -> str:
    """The name of a contender's row, such as "SDPA bf16"."""
    return f"{BUILDERS[key][0]} {dtype}"


def copy_of(model: torch.nn.Module) -> torch.nn.Module:
    """An independent copy for inference: of parameters, buffers, and the config object its modules share."""
    duplicate = copy.deepcopy(model).eval()
    return duplicate.requires_grad_(False)
