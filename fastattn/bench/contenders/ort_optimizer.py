"""ONNX Runtime's own optimizer of transformers, on the graph it is made for: the older exporter's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastattn.bench.contenders.ort_graph import OrtGraph, require_onnx
from fastattn.bench.contenders.quiet import quiet
from fastattn.bench.contenders.runner import Runner, Stages
from fastattn.bench.contenders.source import Source
from fastattn.bench.contenders.traced import Traced
from fastattn.bench.timing import MissingError

__all__ = ["build"]

# Encoders whose attention becomes one node, seen in what it wrote: it has fusions for BERT's graph alone, and
# of ALBERT finds one layer, of MPNet and ModernBERT none.
_LIKE_BERT = (
    "bert", "camembert", "data2vec-text", "distilbert", "electra", "ernie", "roberta", "xlm-roberta"
)  # fmt: skip


def build(source: Source, precision: str, stages: Stages) -> Runner:
    """`torch.onnx.export(dynamo=False)`, `optimize_model` with model type bert, and for int8
    `quantize_dynamic` with signed weights, per channel: U8S8.

    Raises:
        MissingError: a package of the `onnx` extra is not installed, the benchmark does not run on the CPU,
            or the optimizer has no fusions for the model.
    """
    require_onnx(source)
    kind = getattr(source.model.config, "model_type", "")
    if kind not in _LIKE_BERT:
        raise MissingError(
            f"fusions for {kind or type(source.model).__name__}: ONNX Runtime's optimizer has them for "
            f"{', '.join(_LIKE_BERT)}"
        )
    file = source.folder / f"ort-optimizer-{precision}.onnx"
    with quiet():
        with stages("export"):
            raw = _exported(source, file.with_suffix(".raw.onnx"))
        with stages("optimize"):
            _optimized(source, raw, file)
        if precision == "int8":
            with stages("quantize"):
                file = _quantized(file)
    with stages("load"):
        return OrtGraph(file, source.resources)


def _exported(source: Source, file: Path) -> Path:
    traced = Traced(source)
    axes: dict[str, dict[int, str]] = {name: {0: "batch", 1: "sequence"} for name in traced.inputs}
    axes |= {name: {0: "batch"} for name in traced.outputs}
    if "last_hidden_state" in axes:
        axes["last_hidden_state"][1] = "sequence"
    torch.onnx.export(
        traced.module,
        traced.example,
        str(file),
        input_names=list(traced.inputs),
        output_names=list(traced.outputs),
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    return file


def _optimized(source: Source, raw: Path, file: Path) -> None:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model

    config: Any = source.model.config
    optimized = optimize_model(
        str(raw),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        optimization_options=FusionOptions("bert"),
    )
    optimized.save_model_to_file(str(file))


def _quantized(file: Path) -> Path:
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = file.with_suffix(".int8.onnx")
    quantize_dynamic(
        str(file),
        str(target),
        per_channel=True,
        weight_type=QuantType.QInt8,
        # Without it the quantizer fails on the optimizer's nodes, whose outputs it cannot infer.
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )
    return target
