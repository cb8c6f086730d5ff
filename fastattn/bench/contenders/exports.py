"""Exports in ONNX Runtime on the CPU: fastattn's own, and transformers'."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

import fastattn
from fastattn.bench.contenders.ort_graph import OrtGraph, require_onnx, session_options
from fastattn.bench.contenders.quiet import quiet
from fastattn.bench.contenders.requirements import require_packages
from fastattn.bench.contenders.runner import Generated, Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.contenders.stamps import forced_logits, greedy_config, greedy_tokens

__all__ = ["fastattn_onnx", "transformers_onnx"]


def fastattn_onnx(source: Source, precision: str, stages: Stages) -> Runner:
    """`fastattn.export` and `fastattn.load`.

    Raises:
        MissingError: a package of the `onnx` extra is not installed, or the benchmark does not run on the
            CPU.
    """
    require_onnx(source)
    require_packages("optimum", "requests", install='"fastattn[onnx]"')
    folder = source.folder / f"fastattn-onnx-{precision}"
    # Not verified: parity is measured like everyone's, on the very workload that is timed.
    with stages("export"), quiet():
        fastattn.export(source.fused(), folder, precision=precision, verify=False, layouts=())
    with stages("load"):
        model = fastattn.load(folder, session_options())
    runner = ExportedModel(model, source)
    source.resources.callback(runner.close)
    return runner


class ExportedModel(Runner):
    """What `fastattn.load` opened."""

    def __init__(self, model: Any, source: Source) -> None:
        self._model, self._kind = model, source.kind
        if source.kind in ("decoder", "encoder-decoder"):
            model.generation_config = greedy_config(model)

    def forward(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """The model's output; a decoder's logits of the last position, an encoder-decoder's encoder's."""
        if self._kind == "decoder":
            return self._model(**inputs, logits_to_keep=1)
        if self._kind == "encoder-decoder":
            return self._model.get_encoder()(**inputs)
        return self._model(**inputs)

    def generate(self, inputs: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
        return greedy_tokens(self._model, inputs, new_tokens)

    def logits(self, inputs: Mapping[str, torch.Tensor], tokens: torch.Tensor) -> torch.Tensor:
        return forced_logits(self._model, inputs, tokens)

    def close(self) -> None:
        """Let go of the sessions, which hold the files open."""
        self._model = None


def transformers_onnx(source: Source, precision: str, stages: Stages) -> Runner:
    """transformers' `OnnxExporter` with its fusions for ONNX Runtime on a CPU; int8 by its dynamic quantizer.

    Raises:
        MissingError: transformers has no fusions for ONNX Runtime yet, a package of the `onnx` extra is not
            installed, or the benchmark does not run on the CPU.
    """
    require_onnx(source)
    # 5.21 has the quantizer, and not yet the fusions.
    require_packages("transformers.exporters.onnxruntime_fusions", install='"transformers>=5.23"')
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    options: dict[str, Any] = {}
    if precision == "int8":
        options["quantizer"] = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig())
    folder = source.folder / f"transformers-onnx-{precision}"
    model: Any = source.untouched()
    model.set_attn_implementation("sdpa")
    with stages("export"), quiet():
        config = OnnxConfig(dynamic=True, ort_fusions="cpu", **options)
        exported = OnnxExporter().export(model, source.sample, config=config)
        exported.save_pretrained(folder)
    with stages("load"):
        return OrtGraph(folder / "model.onnx", source.resources)
