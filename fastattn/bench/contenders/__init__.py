"""The ways a model can be run, by name: each an independent copy: preparing one never changes another.

A contender in "fp32", "bf16" or "fp16" is built for each dtype asked for; one with `precisions` of its own
(an int8 export) is built for those alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from fastattn.bench.contenders.runner import Generated, Runner, Stages, TrainStep
from fastattn.bench.contenders.source import DTYPES, Kind, Models, Source, auto_dtypes, copy_of, kind_of

__all__ = [
    "AUTO",
    "BUILDERS",
    "DTYPES",
    "UNTOUCHED",
    "Builder",
    "Generated",
    "Kind",
    "Models",
    "Runner",
    "Source",
    "Stages",
    "TrainStep",
    "auto_dtypes",
    "copy_of",
    "kind_of",
    "label",
]

_FORWARD = frozenset({"encode", "classify", "prefill"})
_INFERENCE = _FORWARD | {"decode"}
_ALL = _INFERENCE | {"train"}


@dataclass(frozen=True)
class Builder:
    """How a contender is made.

    Attributes:
        label: its name in tables, before the precision.
        where: "module:function" below this package: `function(source, precision, stages) -> Runner`; loaded
            when it is built, for half of them need packages of their own. Raises MissingError where something
            it needs is not here.
        tasks: of workloads it can run.
        precisions: those it exists in; empty: the dtypes asked for.
        ours: whether it is fastattn's.
        kinds: of models it can run.
        remote: whether it lives in a process of its own anyway.
    """

    label: str
    where: str
    tasks: frozenset[str] = _ALL
    precisions: tuple[str, ...] = ()
    ours: bool = False
    kinds: frozenset[Kind] = frozenset({"encoder", "classifier", "decoder", "encoder-decoder"})
    remote: bool = False

    def build(self, source: Source, precision: str, stages: Stages) -> Runner:
        """The runner, made now."""
        module, _, function = self.where.partition(":")
        make: Callable[[Source, str, Stages], Runner]
        make = getattr(import_module(f"fastattn.bench.contenders.{module}"), function)
        return make(source, precision, stages)


_ENCODERS: frozenset[Kind] = frozenset({"encoder", "classifier"})
_GENERATORS: frozenset[Kind] = frozenset({"decoder", "encoder-decoder"})

# The order is the order of rows.
BUILDERS: dict[str, Builder] = {
    "eager": Builder("eager", "torch_models:eager"),
    "sdpa": Builder("SDPA", "torch_models:sdpa"),
    "flex": Builder("FlexAttention", "torch_models:flex"),
    "compile": Builder("torch.compile", "torch_models:compiled", _FORWARD | {"train"}),
    "compile-reduce-overhead": Builder(
        "torch.compile reduce-overhead", "torch_models:compiled_reduce_overhead", _FORWARD | {"train"}
    ),
    "fastattn-padded": Builder("fastattn padded", "torch_models:fastattn_padded", ours=True),
    "fastattn": Builder("fastattn", "torch_models:fastattn", ours=True),
    "fastattn-graph": Builder("fastattn CUDA graph", "torch_models:fastattn_graph", _FORWARD, ours=True),
    "onnx": Builder("fastattn ONNX", "exports:fastattn_onnx", _INFERENCE, ("fp32",), True),
    "onnx-int8": Builder("fastattn ONNX", "exports:fastattn_onnx", _INFERENCE, ("int8",), True),
    "onnx-int8-weight": Builder("fastattn ONNX", "exports:fastattn_onnx", _INFERENCE, ("int8-weight",), True),
    "onnx-int4-weight": Builder("fastattn ONNX", "exports:fastattn_onnx", _INFERENCE, ("int4-weight",), True),
    "transformers-onnx": Builder(
        "transformers ONNX", "exports:transformers_onnx", _FORWARD, ("fp32",), kinds=_ENCODERS
    ),
    "transformers-onnx-int8": Builder(
        "transformers ONNX", "exports:transformers_onnx", _FORWARD, ("int8",), kinds=_ENCODERS
    ),
    "ort-optimizer": Builder(
        "ONNX Runtime optimizer", "ort_optimizer:build", _FORWARD, ("fp32",), kinds=_ENCODERS
    ),
    "ort-int8": Builder("ONNX Runtime", "ort_optimizer:build", _FORWARD, ("int8",), kinds=_ENCODERS),
    "openvino": Builder("OpenVINO", "openvino:build", _FORWARD, ("fp32",), kinds=_ENCODERS),
    "openvino-bf16": Builder("OpenVINO", "openvino:build", _FORWARD, ("bf16",), kinds=_ENCODERS),
    "ctranslate2": Builder("CTranslate2", "ctranslate2:build", _INFERENCE, ("fp32",)),
    "ctranslate2-int8": Builder("CTranslate2", "ctranslate2:build", _INFERENCE, ("int8",)),
    "liger": Builder("Liger", "liger:build"),
    "optimum": Builder("optimum ORTModel", "optimum:build", _INFERENCE, ("fp32",), remote=True),
}
UNTOUCHED = ("eager", "sdpa")
# Measured where contenders are not named, by type of device.
AUTO = {
    "cpu": ("eager", "sdpa", "compile", "fastattn-padded", "fastattn", "onnx", "onnx-int8"),
    "cuda": (
        "eager", "sdpa", "flex", "compile", "compile-reduce-overhead", "fastattn-padded", "fastattn",
        "fastattn-graph",
    ),
}  # fmt: skip


def label(key: str, precision: str) -> str:
    """The name of a contender's row, such as "SDPA bf16"."""
    return f"{BUILDERS[key].label} {precision}"
