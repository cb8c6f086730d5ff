"""Verification of an exported folder: its files in ONNX Runtime against the untouched model in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastattn.onnx.graph_spec import Source
from fastattn.onnx.runtime.plain import OnnxModel
from fastattn.verification import CaseResult, VerificationError, VerificationReport

__all__ = ["check_export"]


def check_export(folder: Path, source: Source, manifest: Mapping[str, Any]) -> VerificationReport:
    """Compare on batches that break exports; float32, at most 1e-4 of each output's largest value.

    Raises:
        VerificationError: an output is too far off or not finite; the message names the worst case.
    """
    report = VerificationReport()
    report.results.extend(_results(folder, source, manifest))
    if not report.passed:
        raise VerificationError(report)
    return report


def _results(folder: Path, source: Source, manifest: Mapping[str, Any]) -> Iterator[CaseResult]:
    from fastattn.onnx.checks import decoder, encoder, encoder_decoder, module

    if source.kind == "encoder-decoder":
        encode, decode = (OnnxModel(folder, graph=spec.name) for spec in source.graphs)
        return encoder_decoder.results(encode, decode, source)
    run = OnnxModel(folder)
    if source.cache is not None:
        return decoder.results(run.session, source, manifest["graphs"]["model"]["fusions"])
    if source.kind == "module":
        inputs = manifest["graphs"]["model"]["inputs"]
        dimensions = {entry["name"]: tuple(entry["dimensions"]) for entry in inputs}
        return module.results(run, source, dimensions, inputs[0]["bounds"])
    return encoder.results(run, source)
